// Tokenizers other than the demo model's: its vocabulary with other parts around it, and a small one in SentencePiece's manner.
// Each is { name, change } with the fields of tokenizer.json that it replaces.
const split = (pattern, behavior, invert = false) => ({ type: 'Split', pattern, behavior, invert });
const byteLevel = (add_prefix_space, use_regex) => ({ type: 'ByteLevel', add_prefix_space, trim_offsets: true, use_regex });
const sequence = (...pretokenizers) => ({ type: 'Sequence', pretokenizers });
const bytes = byteLevel(false, false);
const added = (id, content, options = {}) => ({
  id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true, ...options,
});
const specials = [added(0, '<|endoftext|>'), added(1, '<|im_start|>'), added(2, '<|im_end|>')];

const llama3 =
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const o200k =
  "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const deepseek = sequence(
  split({ Regex: '\\p{N}{1,3}' }, 'Isolated'),
  split({ Regex: '[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+' }, 'Isolated'),
  split({
    Regex:
      '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+',
  }, 'Isolated'),
  bytes,
);
const template = (before, after) => ({
  type: 'TemplateProcessing',
  single: [...before.map((t) => ({ SpecialToken: { id: t, type_id: 0 } })), { Sequence: { id: 'A', type_id: 0 } },
    ...after.map((t) => ({ SpecialToken: { id: t, type_id: 0 } }))],
  pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
  special_tokens: Object.fromEntries(specials.map((t) => [t.content, { id: t.content, ids: [t.id], tokens: [t.content] }])),
});

function sentencePiece() {
  const vocab = { '<unk>': 0, '<s>': 1, '</s>': 2 };
  const put = (token) => (vocab[token] ??= Object.keys(vocab).length);
  for (let b = 0; b < 256; b++) put(`<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`);
  for (const c of '\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?\'"-\u00e9\u00fc\u4e2d\u6587\u0441\u0442') put(c);
  const merges = [];
  for (const pair of ['\u2581 t', 'h e', '\u2581t he', 'i n', 'e r', '\u2581 a', '\u2581 \u2581', '\u2581\u2581 \u2581\u2581', 'o n', 'r e', '\u2581 w', 'l l', 'l o', 'e llo', 'h ello',
    'H ello', 'ell o', 'e ll', 'H ell', 'Hell o', '\u2581 H', '\u2581H ello', 'in g', 'a t', '\u2581 in', '\u4e2d \u6587', '\u0441 \u0442', 'u s', 'us er']) {
    const [left, right] = pair.split(' ');
    put(left), put(right), put(left + right), merges.push([left, right]);
  }
  return { vocab, merges };
}

const spModel = (options) => ({
  type: 'BPE', dropout: null, unk_token: '<unk>', continuing_subword_prefix: null, end_of_word_suffix: null, fuse_unk: true,
  byte_fallback: true, ignore_merges: false, ...sentencePiece(), ...options,
});
const spAdded = [added(0, '<unk>'), added(1, '<s>'), added(2, '</s>')];
const spTemplate = {
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
  special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
};
const spDecoder = {
  type: 'Sequence',
  decoders: [{ type: 'Replace', pattern: { String: '\u2581' }, content: ' ' }, { type: 'ByteFallback' }, { type: 'Fuse' },
    { type: 'Strip', content: ' ', start: 1, stop: 0 }],
};
const spNormalizer = {
  type: 'Sequence',
  normalizers: [{ type: 'Prepend', prepend: '\u2581' }, { type: 'Replace', pattern: { String: ' ' }, content: '\u2581' }],
};
const spChange = (options, rest = {}) => ({
  model: spModel(options), added_tokens: spAdded, normalizer: spNormalizer, pre_tokenizer: null, post_processor: spTemplate,
  decoder: spDecoder, ...rest,
});

export const variants = [
  { name: 'gpt2', change: { pre_tokenizer: byteLevel(true, true) } },
  { name: 'gpt2 without prefix space', change: { pre_tokenizer: byteLevel(false, true), post_processor: byteLevel(true, true) } },
  { name: 'llama3', change: { pre_tokenizer: sequence(split({ Regex: llama3 }, 'Isolated'), bytes), post_processor: { type: 'Sequence', processors: [byteLevel(true, true), template(['<|endoftext|>'], [])] } } },
  { name: 'llama3 removed inverted', change: { pre_tokenizer: sequence(split({ Regex: llama3 }, 'Removed', true), bytes) } },
  { name: 'o200k', change: { pre_tokenizer: sequence(split({ Regex: o200k }, 'Isolated'), bytes) } },
  { name: 'deepseek', change: { pre_tokenizer: deepseek } },
  { name: 'nfc', change: { normalizer: { type: 'NFC' } } },
  { name: 'nfkd', change: { normalizer: { type: 'Sequence', normalizers: [{ type: 'NFKD' }, { type: 'Replace', pattern: { Regex: '\\s+' }, content: '_' }] } } },
  { name: 'nfkc', change: { normalizer: { type: 'NFKC' } } },
  { name: 'nfd', change: { normalizer: { type: 'NFD' } } },
  ...['Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'].flatMap((behavior) => [
    { name: `split on spaces ${behavior}`, change: { pre_tokenizer: sequence(split({ String: ' ' }, behavior), bytes) } },
    { name: `split on vowels ${behavior} inverted`, change: { pre_tokenizer: sequence(split({ Regex: '[aeiou]' }, behavior, true), bytes) } },
    { name: `split on x* ${behavior}`, change: { pre_tokenizer: sequence(split({ Regex: 'x*' }, behavior), bytes) } },
  ]),
  { name: 'digits', change: { pre_tokenizer: sequence({ type: 'Digits', individual_digits: false }, bytes) } },
  { name: 'individual digits', change: { pre_tokenizer: sequence({ type: 'Digits', individual_digits: true }, byteLevel(false, true)) } },
  { name: 'punctuation', change: { pre_tokenizer: sequence({ type: 'Punctuation', behavior: 'Isolated' }, bytes) } },
  { name: 'whitespace', change: { pre_tokenizer: sequence({ type: 'Whitespace' }, bytes) } },
  { name: 'whitespace split', change: { pre_tokenizer: sequence({ type: 'WhitespaceSplit' }, bytes) } },
  { name: 'classes', change: { pre_tokenizer: sequence(split({ Regex: '[\\W\\d]'.replace('\\W', '\\s') + '|\\W|[^\\S\\n]+|\\w+(?=\\D)' }, 'Isolated'), bytes) } },
  { name: 'scripts', change: { pre_tokenizer: sequence(split({ Regex: '\\p{Han}+|[\\p{Hiragana}\\p{Katakana}]+|\\P{^Greek}|\\p{^Cyrillic}' }, 'Isolated'), bytes) } },
  {
    name: 'negated sets in classes',
    change: { pre_tokenizer: sequence(split({ Regex: '[\\W\\d]+|[^\\P{L}a-f]+|[\\S]' }, 'Isolated'), split({ Regex: '[^\\D\\p{Han}]|[-^\\P{^Lu}-]+' }, 'Isolated'), bytes) },
  },
  {
    name: 'classes in classes',
    change: { pre_tokenizer: sequence(split({ Regex: ' ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+' }, 'Isolated'), split({ Regex: '[^a-f[^\\p{L}[0-5]]]+' }, 'Isolated'), bytes) },
  },
  {
    name: 'intersections',
    change: {
      pre_tokenizer: sequence(split({ Regex: '[\\p{Han}]+|[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]+|[\\p{Ll}&&[^a-m]&&\\P{Cyrillic}]+' }, 'Isolated'),
        split({ Regex: '[^\\p{L}&&[^\\p{N}]]+' }, 'Isolated'), bytes),
    },
  },
  { name: 'unassigned', change: { pre_tokenizer: sequence(split({ Regex: '\\p{Cn}+|[\\p{C}a]+|\\P{C}' }, 'Isolated'), bytes) } },
  { name: 'scripts and properties', change: { pre_tokenizer: sequence(split({ Regex: '\\p{Hani}+|[\\p{Latin}\\p{Cyrl}]+|\\p{Lowercase}+|\\p{Emoji}+|\\p{Katakana}|\\p{Common}+' }, 'Isolated'), bytes) } },
  { name: 'ignore merges', model: { ignore_merges: true }, change: { pre_tokenizer: bytes } },
  { name: 'template', change: { post_processor: template(['<|endoftext|>', '<|im_start|>'], ['<|im_end|>']) } },
  {
    name: 'added tokens',
    change: {
      normalizer: { type: 'NFC' },
      added_tokens: [...specials, added(4793, 'foo', { single_word: true, special: false }), added(3046, 'bar', { lstrip: true, special: false }),
        added(8192, 'x\n', { rstrip: true, special: false }), added(8193, 'caf\u0065\u0301', { normalized: true, special: false }),
        added(836, 'the', { single_word: true, lstrip: true, rstrip: true, special: false }), added(8194, 'a ', { special: false }),
        added(8195, ' the the', { normalized: true, special: false }), added(168, '\u00e9', { single_word: true, special: false }), added(8196, '<|im_', {})],
    },
  },
  { name: 'sentencepiece', change: spChange({}) },
  { name: 'sentencepiece without bytes', change: spChange({ byte_fallback: false }) },
  { name: 'sentencepiece unknowns apart', change: spChange({ byte_fallback: false, fuse_unk: false }) },
  ...['always', 'first', 'never'].map((prepend_scheme) => ({
    name: `metaspace ${prepend_scheme}`,
    change: spChange({}, { normalizer: null, pre_tokenizer: { type: 'Metaspace', replacement: '\u2581', prepend_scheme, split: prepend_scheme !== 'first' } }),
  })),
];

// Where the model is the demo's, it stays out of the change, so that a file of cases stays small.
export function apply(base, variant) {
  return { ...base, ...variant.change, model: variant.change.model ?? { ...base.model, ...variant.model } };
}
