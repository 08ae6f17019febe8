// Texts on which tokenizers disagree when they disagree at all, and seeded mixtures of their parts.
import fs from 'node:fs';

export const oddTexts = [
  '', ' ', '  ', '\n', '\r\n', '\t', '\0', 'a\0b', '\0\0\0', 'a', ' a', 'a ', '  a', 'a  b', 'a   b  ', '   \n   x',
  'Hello, world!', "I'm you're he'll we've they'd it's don't", "I'M YOU'RE HE'LL WE'VE THEY'D IT'S DON'T", "'s 't '\u017f 'LL \u212a",
  "''s'''t \u2019s don\u2019t", 'The quick brown fox jumps over the lazy dog.', '1', '12', '123', '1234567890', '3.14159e-10', '1,000,000',
  '\u0661\u0662\u0663 \u0967\u0968 \u2160\u2161 \u00bd \u00b2', '   leading', 'trailing   ', '\n\n\nfoo\n\n\nbar\n', '\r\r\n\n\r', ' \r\n \r\n', ' \n \n ',
  '\t\tindented\n\t\t\tmore', 'tabs\tand spaces \t mixed', 'x\n', 'x \n', 'x  \n\n  y', '...\n', '!!!\r\n\r\n', '?\n\n\n  ?',
  'int main(void) {\n    printf("%d\\n", 1 << 20);\n    return 0;\n}\n', 'for (let i=0;i<10;i++){a[i]=b[i]**2;}', '#!/bin/sh\nset -eu; echo "$@" >&2',
  'SELECT * FROM t WHERE a=\'b\' -- c', '<html><body class="x">&nbsp;</body></html>', '{"key": [1, 2.5, null, true], "\\u00e9": "\\n"}',
  'def f(x):\n\treturn x if x else None\n', 'https://example.org/a/b?c=d&e=f#g', 'user@example.org', 'C:\\Windows\\System32', '/usr/bin/env',
  'snake_case camelCase PascalCase kebab-case SCREAMING_CASE', '__init__ ___ _ a_b', '--flag=value -x', '=====', '-----\n=====\n', '$100 \u20ac50 \u00a33 \u00a5',
  '\u00e9\u00e8\u00ea\u00eb caf\u00e9 na\u00efve \u00fcber stra\u00dfe', 'e\u0301 a\u0308 o\u0302\u0323 n\u0303', 'Z\u0351\u036b\u0343\u0300a\u0302\u0329l\u0301g\u0334o\u0321', '\u0301alone', ' \u0301', '\u1e9b\u0323 \ufb01 \u212b \u2126',
  '\u0412\u0441\u0435 \u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\u0435 \u0441\u0435\u043c\u044c\u0438', '\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u03b3\u03bb\u03ce\u03c3\u03c3\u03b1', '\u0540\u0561\u0575\u0565\u0580\u0565\u0576', '\u10e5\u10d0\u10e0\u10d7\u10e3\u10da\u10d8', '\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd', '\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645', '\u200fRTL\u200e marks \u202eoverride\u202c',
  '\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e', '\u09ac\u09be\u0982\u09b2\u09be', '\u0ba4\u0bae\u0bbf\u0bb4\u0bcd', '\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01', '\u0ea5\u0eb2\u0ea7', '\u1798\u17b6\u1793', '\u0f56\u0f7c\u0f51\u0f0b', '\u1019\u103c\u1014\u103a\u1019\u102c', '\u12a0\u121b\u122d\u129b',
  '\u4f60\u597d\uff0c\u4e16\u754c\uff01', '\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3002', '\u30ab\u30bf\u30ab\u30ca\u3000\u5168\u89d2', '\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4', '\u1112\u1161\u11ab', '\ud840\udc00\ud869\uded6', '\uff21\uff22\uff23\uff11\uff12\uff13', '\u4e00\u4e8c\u4e09\u56db',
  '\u{1f600}\u{1f601}', '\u{1f468}\u200d\u{1f469}\u200d\u{1f467}\u200d\u{1f466}', '\u{1f44d}\u{1f3fd}', '\u{1f1e9}\u{1f1ea}\u{1f1eb}\u{1f1f7}', '\u2764\ufe0f \u2764', '1\ufe0f\u20e3', 'a\u{1f600}b \u{1f600} c', '\u{1f3f4}\u{e0067}\u{e0062}\u{e007f}',
  '\u200b', 'a\u200bb', '\u200d', '\u2060', '\u00a0', 'a\u00a0b', '\u00a0\u00a0x', '\u2003\u2009x', '\u3000\u3000', '\u2028\u2029', 'a\u2028b\u2029c', '\u000b\f', '\u001c\u001d\u001e\u001f', '\u007f\u0080\u009f', '\u00ad',
  '\ue000\uf8ff', '\u{10ffff}', '\ufffd', '\ufffe\uffff', '\u{1d400}\u{1d41a}\u{1d7ce}', '\u{1f130}\u24b6', '\u2070\u2071', '\u0300\u0301\u0302', '\u093f\u0301',
  '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n', '<|endoftext|>', '<|endoftext|><|endoftext|>', 'a<|im_end|>b', ' <|im_end|> ', '<|im_end', '|im_end|>', '<<|im_end|>>', '<|IM_END|>', '<|im_<|im_end|>end|>', '<|im_start|><|im_start|>',
  'x'.repeat(400), 'ab'.repeat(300), ' '.repeat(500), '\n'.repeat(300), ' \n'.repeat(150), ' '.repeat(100) + 'x', '\u00e9'.repeat(200), '\u{1f600}'.repeat(80), '9'.repeat(100), '-'.repeat(200),
  'Donaudampfschiffahrtselektrizit\u00e4tenhauptbetriebswerkbauunterbeamtengesellschaft', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaab', 'the the the the', 'THE The tHE', 'in in\u0131n \u0130n', 'ABC\u02bcs', '\ua69f\ua69e',
];

// On these JavaScript's \s or its newer Unicode tables differ from Rust's, which decides.
export const rareTexts = [
  '\u0085', 'a\u0085b', ' \u0085 x', '\ufeff', '\ufeffBOM', 'a\ufeff b', ' \ufeff\n', '\u180e', 'a\u180eb \u180e', '\u0085\ufeff\u180e', '\u1c89\u1c8a', '\ua7cb', '\u{1cce0}',
  // assigned in Unicode 15 to 16: letters, a mark, digits, punctuation, symbols, ideographs
  '\u{10d50}\u{10d70}\u{10d6a}', ' \u{1e4d0}\u{1e4f3}\u{1e030}', '\u{11bf1}\u{11be1}\u{1fadc}', 'a\u{2ebf0}\u{31350}\u{323af} \u{2ee5d}', '\u{1171e}\u{1b132}\u{1b155}',
];
export const rareCharacters = /[\u0085\ufeff\u180e\u1c89\u1c8a\ua7cb\u{1cce0}\u{20000}-\u{e0fff}]/u;

export const specials = ['<|im_start|>', '<|im_end|>', '<|endoftext|>'];

const wellFormed = (text) => text.replace(/[\ud800-\udfff]/gu, '\ufffd'); // only lone surrogates match

// Mulberry32
export function random(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

export function mixedTexts(seed, count, tokens = specials) {
  const next = random(seed);
  const pick = (list) => list[Math.floor(next() * list.length)];
  const parts = oddTexts.filter((text) => text.length > 0 && text.length < 60);
  const glue = ['', '', '', ' ', '  ', '\n', '\r\n', '\t', "'", '.', '\u00a0', '\u200d', '\u0301', ...tokens];
  const texts = [];
  for (let i = 0; i < count; i++) {
    let text = '';
    for (let n = 1 + Math.floor(next() * 8); n > 0; n--) {
      const part = pick(parts);
      const from = Math.floor(next() * part.length);
      text += next() < 0.5 ? part : part.slice(from, from + 1 + Math.floor(next() * 6));
      text += pick(glue);
    }
    texts.push(wellFormed(text));
  }
  return texts;
}

// Every code point of the first two planes, and those around the ends of the blocks beyond, 61 to a text, in the company of letters
// and spaces.
export function allCharacters() {
  const ranges = [[0, 0x20000], [0x2a6c0, 0x2a720], [0x2b720, 0x2b830], [0x2ce90, 0x2cec0], [0x2eba0, 0x2ec40], [0x2ee40, 0x2ee80],
    [0x2f7f0, 0x2fa30], [0x31330, 0x31370], [0x32390, 0x323d0], [0xe0000, 0xe0200]];
  const texts = [];
  for (const [from, to] of ranges) {
    for (let base = from; base < to; base += 61) {
      let text = '';
      for (let c = base; c < base + 61; c++) text += String.fromCodePoint(c) + ['', 'a', ' ', '7', '\n'][c % 5];
      texts.push(wellFormed(text));
    }
  }
  return texts;
}

export function validTexts(root) {
  const lines = fs.readFileSync(`${root}/tests/data/valid.jsonl`, 'utf8').split('\n');
  return lines.filter((line) => line).map((line) => JSON.parse(line).text);
}
