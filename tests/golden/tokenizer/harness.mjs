// What the comparisons share: our tokenizer's answers (the program tokenize_lines), and the count of what agrees.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { random } from './texts.mjs';

// The answers of ours, with the tokenizer.json of `folder`, to requests { text | ids, special }.
export function ours(program, folder, requests) {
  const input = requests.map((request) => JSON.stringify(request) + '\n').join('');
  const run = spawnSync(program, [folder], { input, maxBuffer: 1 << 30 });
  if (run.status !== 0) throw new Error(`${program}: ${run.stderr} (status ${run.status})`);
  const lines = run.stdout.toString().split('\n').slice(0, -1).map((line) => JSON.parse(line));
  if (lines.length !== requests.length) throw new Error(`${lines.length} answers to ${requests.length} requests`);
  return lines;
}

export function oursOf(program, json, requests) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'tokenizer-'));
  try {
    fs.writeFileSync(path.join(folder, 'tokenizer.json'), JSON.stringify(json));
    return ours(program, folder, requests);
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

export class Tally {
  passed = 0;
  failed = 0;

  check(what, request, expected, got) {
    if (JSON.stringify(expected) === JSON.stringify(got)) return void this.passed++;
    this.failed++;
    if (this.failed <= 10)
      console.log(`${what}: ${JSON.stringify(request).slice(0, 300)}\n  expected ${JSON.stringify(expected).slice(0, 300)}\n  got      ${JSON.stringify(got).slice(0, 300)}`);
  }
}

export function randomIds(count, vocab) {
  const next = random(7);
  return Array.from({ length: count }, () => Array.from({ length: 1 + Math.floor(next() * 24) }, () => Math.floor(next() * vocab)));
}
