// Compares ours (the program tokenize_lines) with both oracles, on more texts than the committed cases hold.
// usage: ORACLE_MODULES=… node compare.mjs ROOT TOKENIZE_LINES
import fs from 'node:fs';
import { oursOf, randomIds, Tally } from './harness.mjs';
import { allCharacters, mixedTexts, oddTexts, rareCharacters, rareTexts, validTexts } from './texts.mjs';
import { lenml, rust, versions } from './oracles.mjs';
import { apply, variants } from './variants.mjs';

const [root, program] = process.argv.slice(2);
const read = (name) => JSON.parse(fs.readFileSync(`${root}/models/demo/${name}`, 'utf8'));
const base = read('tokenizer.json');
const tally = new Tally();
const ours = (json, requests) => oursOf(program, json, requests);
const check = (...args) => tally.check(...args);

async function compare(what, oracle, json, encodes, decodes) {
  const answers = ours(json, [...encodes, ...decodes]);
  for (const [i, request] of encodes.entries())
    check(what, request, await oracle.encode(request.text, request.special), answers[i]);
  for (const [i, request] of decodes.entries())
    check(what, request, await oracle.decode(request.ids, !request.special), answers[encodes.length + i]);
}

const odd = [...oddTexts, ...rareTexts];
const all = [...odd, ...mixedTexts(1, 1500), ...allCharacters(), ...validTexts(root), validTexts(root).join('\n\n')];
const plain = all.map((text) => ({ text, special: false }));
const ids = randomIds(2000, 8192).flatMap((list) => [{ ids: list, special: true }, { ids: list, special: false }]);
await compare('tokenizers', rust(base), base, plain, ids);
const common = plain.filter(({ text }) => !rareCharacters.test(text));
await compare('@lenml/tokenizers', await lenml(base, read('tokenizer_config.json')), base, common, ids);

const golden = read('golden.json').cases;
for (const [i, answer] of ours(base, golden.map(({ prompt }) => ({ text: prompt }))).entries())
  check('golden.json', golden[i].prompt, golden[i].ids, answer);

const STEP = Number(process.env.STEP ?? 16); // every so many-th text of all characters
const few = [...odd, ...mixedTexts(2, 200), ...allCharacters().filter((_, i) => i % STEP === 0), ...validTexts(root).slice(0, 50)];
for (const variant of variants) {
  const json = apply(base, variant);
  const requests = few.flatMap((text) => [{ text, special: false }, { text, special: true }]);
  await compare(variant.name, rust(json), json, requests, []);
}
console.log(`tokenizer oracle (tokenizers ${versions.tokenizers}, @lenml/tokenizers ${versions['@lenml/tokenizers']}): ${tally.passed} passed, ${tally.failed} failed`);
process.exit(tally.failed ? 1 : 0);
