// Makes tests/data/tokenizer/*_cases.json from Hugging Face's tokenizer; texts on which @lenml/tokenizers must agree are checked to.
// usage: ORACLE_MODULES=… node make_cases.mjs ROOT
import fs from 'node:fs';
import { allCharacters, mixedTexts, oddTexts, random, rareTexts } from './texts.mjs';
import { lenml, rust, versions } from './oracles.mjs';
import { apply, variants } from './variants.mjs';

const [root] = process.argv.slice(2);
const read = (name) => JSON.parse(fs.readFileSync(`${root}/models/demo/${name}`, 'utf8'));
const base = read('tokenizer.json');
const madeBy = `tests/golden/tokenizer/make_cases.mjs with npm's tokenizers ${versions.tokenizers} (Hugging Face) and @lenml/tokenizers ${versions['@lenml/tokenizers']}`;
const lines = (list) => '[\n' + list.map((item) => JSON.stringify(item)).join(',\n') + '\n]';

const reference = rust(base);
const javascript = await lenml(base, read('tokenizer_config.json'));
const encode = [];
for (const text of [...oddTexts, ...mixedTexts(3, 150), ...allCharacters().filter((_, i) => i % 40 === 0)]) {
  const ids = await reference.encode(text, false);
  if (JSON.stringify(ids) !== JSON.stringify(await javascript.encode(text, false))) throw new Error(`oracles differ: ${text}`);
  encode.push([text, ids]);
}
for (const text of rareTexts) encode.push([text, await reference.encode(text, false)]);

const decode = [];
const next = random(11);
for (let i = 0; i < 200; i++) {
  const ids = Array.from({ length: 1 + Math.floor(next() * 12) }, () => Math.floor(next() * (i % 2 ? 300 : 8192)));
  for (const skipSpecial of [false, true]) decode.push([ids, skipSpecial, await reference.decode(ids, skipSpecial)]);
}
fs.writeFileSync(`${root}/tests/data/tokenizer/demo_cases.json`,
  `{"made_by": ${JSON.stringify(madeBy)},\n"encode": ${lines(encode)},\n"decode": ${lines(decode)}}\n`);

const short = [...oddTexts, ...rareTexts, ...mixedTexts(4, 30)].filter((text) => text.length < 60);
const rows = [];
for (const [n, variant] of variants.entries()) {
  const json = apply(base, variant);
  const tokenizer = rust(json);
  const cases = [];
  for (const [i, text] of short.entries())
    if (i % 6 === n % 6 || (variant.change.added_tokens && !variant.change.model)) cases.push([text, i % 2 === 1, await tokenizer.encode(text, i % 2 === 1)]);
  const decoded = [];
  for (const [, , ids] of variant.change.decoder ? cases : []) decoded.push([ids, await tokenizer.decode(ids, true)]);
  rows.push({ name: variant.name, change: variant.change, model: variant.model, encode: cases, decode: decoded });
}
const rowText = ({ encode: cases, decode: decoded, ...head }) =>
  `{${JSON.stringify(head).slice(1, -1)},\n"encode": ${lines(cases)},\n"decode": ${lines(decoded)}}`;
fs.writeFileSync(`${root}/tests/data/tokenizer/variant_cases.json`,
  `{"made_by": ${JSON.stringify(madeBy)},\n"variants": [\n${rows.map(rowText).join(',\n')}\n]}\n`);
