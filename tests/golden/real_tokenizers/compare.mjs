// Compares ours (the program tokenize_lines) on a real model's tokenizer with Hugging Face's own (package `tokenizers`) and with
// @lenml/tokenizers. Where those two differ Hugging Face's decides; how often they do is printed.
// usage: ORACLE_MODULES=… node compare.mjs ROOT TOKENIZE_LINES NAME   (NAME: of a package @lenml/tokenizer-NAME)
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import { ours, randomIds, Tally } from '../tokenizer/harness.mjs';
import { lenml, rustOf, versions } from '../tokenizer/oracles.mjs';
import { allCharacters, mixedTexts, oddTexts, rareTexts, validTexts } from '../tokenizer/texts.mjs';
import { languages } from './languages.mjs';

const [root, program, name] = process.argv.slice(2);
const folder = `${process.env.ORACLE_MODULES}/@lenml/tokenizer-${name}/models`;
const read = (file) => JSON.parse(fs.readFileSync(`${folder}/${file}`, 'utf8'));
const json = read('tokenizer.json');
const rust = rustOf(`${folder}/tokenizer.json`);
const javascript = await lenml(json, read('tokenizer_config.json'));
const tally = new Tally();

// This repository's own sources and documents, in pieces of some thousand characters.
function codeTexts() {
  const files = execFileSync('git', ['-C', root, 'ls-files', '*.c', '*.py', '*.mjs', '*.sh', '*.md', '*.txt', '*.jinja']).toString().trim().split('\n');
  return files.filter((_, i) => i % 4 === 0).flatMap((file) => fs.readFileSync(`${root}/${file}`, 'utf8').match(/[^]{1,3000}/g) ?? []);
}

const added = json.added_tokens.map((token) => token.content);
const tokens = added.filter((_, i) => i % Math.ceil(added.length / 12) === 0);
const ordinary = [...oddTexts, ...languages, languages.join('\n'), ...codeTexts(), ...validTexts(root).filter((_, i) => i % 6 === 0),
  ...mixedTexts(5, 800, tokens), ...tokens.flatMap((token) => [token, ` ${token} x`, token.slice(1), token + token])];
const rare = [...rareTexts, ...allCharacters()];

const request = (text, i) => ({ text, special: i % 4 === 0 });
const requests = [...ordinary, ...rare].map(request);
const expected = [];
for (const { text, special } of requests) expected.push(await rust.encode(text, special));
let differ = 0;
const decodes = [
  ...randomIds(1000, Object.keys(json.model.vocab).length + added.length),
  ...expected.slice(0, ordinary.length).filter((ids) => ids.length && ids.length < 400),
].map((ids, i) => ({ ids, special: i % 2 === 0 }));
const answers = ours(program, folder, [...requests, ...decodes]);
for (const [i, one] of requests.entries()) {
  tally.check(`${name}: tokenizers`, one, expected[i], answers[i]);
  if (i >= ordinary.length) continue;
  const ids = await javascript.encode(one.text, one.special);
  if (JSON.stringify(ids) === JSON.stringify(expected[i])) tally.check(`${name}: @lenml/tokenizers`, one, ids, answers[i]);
  else differ++;
}
for (const [i, one] of decodes.entries())
  tally.check(`${name}: decode, tokenizers`, one, await rust.decode(one.ids, !one.special), answers[requests.length + i]);
if (differ) console.log(`${name}: @lenml/tokenizers differs from Hugging Face's on ${differ} of ${ordinary.length} texts`);
console.log(`${name} (tokenizers ${versions.tokenizers}): ${tally.passed} passed, ${tally.failed} failed`);
process.exit(tally.failed ? 1 : 0);
