// Makes router/tokenizer/unicode_additions.c: for each property of patterns, the characters that Hugging Face's tokenizer
// (package `tokenizers`: Oniguruma with Unicode 16) gives it and Unicode 14, which Debian 12's PCRE2 knows, did not. The old sets
// are Perl's, Debian 12's own, of the same version.
// usage: ORACLE_MODULES=… node make_unicode_additions.mjs ROOT
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import { rust } from './oracles.mjs';

const [root] = process.argv.slice(2);
const categories = 'Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co'.split(' ');
const binary = ['Alphabetic', 'White_Space', 'Uppercase', 'Lowercase', 'Ideographic', 'Emoji'];
const perl = (program) => execFileSync('perl', ['-MUnicode::UCD=prop_values,prop_value_aliases', '-e', program], { maxBuffer: 1 << 28 }).toString();
if (perl('print Unicode::UCD::UnicodeVersion()') !== '14.0.0') throw new Error('this needs Debian 12\'s perl, which has Unicode 14');
const scripts = perl('for (prop_values("sc")) { my @n = prop_value_aliases("sc", $_); print "$n[1] $n[0]\\n" }').trim().split('\n')
  .map((line) => line.split(' ')).filter(([name]) => name && !['Unknown', 'Katakana_Or_Hiragana'].includes(name));

const properties = [...categories.map((n) => [n, n, n]), ...binary.map((n) => [n, n, n]), ...scripts.map(([n, a]) => [n, a, `sc=${n}`])];
// Unicode 14's code points of each property: lines of ranges
const old = perl(`my $all = join '', map { chr } 0 .. 0x10ffff; no warnings;
  for my $p (qw(${properties.map(([, , property]) => property).join(' ')})) {
    while ($all =~ /\\p{$p}+/g) { print $-[0], ' ', $+[0] - 1, ' ' } print "\\n" }`)
  .split('\n').map((line) => line.trim().split(' ').filter((n) => n).map(Number));

const byteChars = {}; // GPT-2's spelling of bytes
for (let b = 0, n = 0; b < 256; b++)
  byteChars[String.fromCodePoint((b > 32 && b < 127) || (b > 160 && b !== 173) ? b : 256 + n++)] = b;
const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false };
let everything = '';
for (let c = 0; c < 0x110000; c++) if (c < 0xd800 || c > 0xdfff) everything += String.fromCodePoint(c);
const parts = everything.match(/.{1,10000}/gsu);

async function now(property) { // the characters that \P{property} does not remove
  const tokenizer = rust({
    version: '1.0', truncation: null, padding: null, added_tokens: [], post_processor: null, decoder: byteLevel,
    normalizer: { type: 'Replace', pattern: { Regex: `\\P{${property}}` }, content: '' },
    pre_tokenizer: { type: 'Sequence', pretokenizers: [{ type: 'Split', pattern: { Regex: '(?m:.)' }, behavior: 'Isolated', invert: false }, byteLevel] },
    model: { type: 'BPE', dropout: null, unk_token: null, continuing_subword_prefix: null, end_of_word_suffix: null, fuse_unk: false, byte_fallback: false, vocab: byteChars, merges: [] },
  });
  const found = [];
  for (const part of parts) for (const character of Buffer.from(await tokenizer.encode(part, false)).toString()) found.push(character.codePointAt(0));
  return found;
}

const hex = (c) => `\\\\x{${c.toString(16)}}`;
function rangeText(points) {
  const ranges = [];
  for (const c of points) {
    const last = ranges.at(-1);
    if (last && last[1] === c - 1) last[1] = c;
    else ranges.push([c, c]);
  }
  return ranges.map(([from, to]) => (from === to ? hex(from) : `${hex(from)}-${hex(to)}`));
}

const rows = [];
for (const [i, [name, alias]] of properties.entries()) {
  const was = new Set();
  for (let r = 0; r < old[i].length; r += 2) for (let c = old[i][r]; c <= old[i][r + 1]; c++) was.add(c);
  const current = await now(name);
  const is = new Set(current);
  const lost = [...was].filter((c) => !is.has(c));
  if (lost.length) console.log(`${name} lost ${lost.map((c) => c.toString(16)).join(' ')}`);
  const added = rangeText(current.filter((c) => !was.has(c)));
  if (!added.length) continue;
  const lines = [''];
  for (const range of added) {
    if ((lines.at(-1) + range).length > 110) lines.push('');
    lines[lines.length - 1] += range;
  }
  rows.push(`    {"${name}", "${alias}",\n${lines.map((line) => `     "${line}"`).join('\n')}},`);
}
fs.writeFileSync(`${root}/router/tokenizer/unicode_additions.c`, `/* Made by tests/golden/tokenizer/make_unicode_additions.mjs; do not edit. */
/* clang-format off */
#include "router/tokenizer/unicode_additions.h"

const moe_unicode_addition moe_unicode_additions[] = {
${rows.join('\n')}
};

const size_t moe_num_unicode_additions = sizeof moe_unicode_additions / sizeof *moe_unicode_additions;
`);
