// The two tokenizers that ours is compared with: Hugging Face's own (Rust, package `tokenizers`), which decides, and
// @lenml/tokenizers (JavaScript). Both are found in the folder named by ORACLE_MODULES.
import { createRequire } from 'node:module';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const modules = process.env.ORACLE_MODULES;
if (!modules) throw new Error('ORACLE_MODULES: the node_modules folder is not set (run tokenizer_oracle.sh)');
const requireFrom = createRequire(pathToFileURL(path.join(modules, 'x.js')));
const { Tokenizer } = requireFrom('tokenizers');

export const versions = Object.fromEntries(['tokenizers', '@lenml/tokenizers'].map((name) => [
  name, JSON.parse(fs.readFileSync(path.join(modules, name, 'package.json'), 'utf8')).version]));

export function rustOf(file) {
  const tokenizer = Tokenizer.fromFile(file);
  return {
    encode: async (text, special) => (await tokenizer.encode(text, null, { addSpecialTokens: special })).getIds(),
    decode: (ids, skipSpecial) => tokenizer.decode(ids, skipSpecial),
  };
}

export function rust(json) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'tokenizer-'));
  try {
    fs.writeFileSync(path.join(folder, 'tokenizer.json'), JSON.stringify(json));
    return rustOf(path.join(folder, 'tokenizer.json'));
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

export async function lenml(json, config) {
  const { TokenizerLoader } = await import(pathToFileURL(path.join(modules, '@lenml/tokenizers/dist/main.mjs')));
  const tokenizer = TokenizerLoader.fromPreTrained({ tokenizerJSON: json, tokenizerConfig: config });
  return {
    encode: async (text, special) => tokenizer.encode(text, { add_special_tokens: special }),
    decode: async (ids, skipSpecial) =>
      tokenizer.decode(ids, { skip_special_tokens: skipSpecial, clean_up_tokenization_spaces: false }),
  };
}
