// Compares ours (the program tokenize_lines) with both oracles, on more texts than the committed cases hold.
// usage: ORACLE_MODULES=… node compare.mjs ROOT TOKENIZE_LINES
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { allCharacters, mixedTexts, notNormalized, oddTexts, random, rareCharacters, rareTexts, validTexts } from './texts.mjs';
import { lenml, rust, versions } from './oracles.mjs';
import { apply, variants } from './variants.mjs';

const [root, program] = process.argv.slice(2);
const read = (name) => JSON.parse(fs.readFileSync(`${root}/models/demo/${name}`, 'utf8'));
const base = read('tokenizer.json');
let passed = 0;
let failed = 0;

function ours(json, requests) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'tokenizer-'));
  try {
    fs.writeFileSync(path.join(folder, 'tokenizer.json'), JSON.stringify(json));
    const input = requests.map((request) => JSON.stringify(request) + '\n').join('');
    const run = spawnSync(program, [folder], { input, maxBuffer: 1 << 30 });
    if (run.status !== 0) throw new Error(`${program}: ${run.stderr} (status ${run.status})`);
    const lines = run.stdout.toString().split('\n').slice(0, -1).map((line) => JSON.parse(line));
    if (lines.length !== requests.length) throw new Error(`${lines.length} answers to ${requests.length} requests`);
    return lines;
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

function check(what, request, expected, got) {
  if (JSON.stringify(expected) === JSON.stringify(got)) return void passed++;
  failed++;
  if (failed <= 10)
    console.log(`${what}: ${JSON.stringify(request).slice(0, 300)}\n  expected ${JSON.stringify(expected).slice(0, 300)}\n  got      ${JSON.stringify(got).slice(0, 300)}`);
}

function randomIds(count, vocab) {
  const next = random(7);
  return Array.from({ length: count }, () => Array.from({ length: 1 + Math.floor(next() * 24) }, () => Math.floor(next() * vocab)));
}

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
  const texts = json.normalizer ? few.filter((text) => !notNormalized.test(text)) : few;
  const requests = texts.flatMap((text) => [{ text, special: false }, { text, special: true }]);
  await compare(variant.name, rust(json), json, requests, []);
}
console.log(`tokenizer oracle (tokenizers ${versions.tokenizers}, @lenml/tokenizers ${versions['@lenml/tokenizers']}): ${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
