// Talks to a server with OpenAI's own client and checks types and values of what comes back.
//   node openai_client.mjs BASE_URL MODEL [API_KEY]     BASE_URL ends in /v1
import assert from 'node:assert/strict';
import OpenAI from 'openai';

const [baseURL, model, apiKey = 'none'] = process.argv.slice(2);
if (!model) {
  console.error('usage: node openai_client.mjs BASE_URL MODEL [API_KEY]');
  process.exit(2);
}
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000 });
const messages = [
  { role: 'system', content: 'You answer briefly.' },
  { role: 'user', content: [{ type: 'text', text: 'Define cat.' }] },
];
const greedy = { model, messages, temperature: 0, max_tokens: 12 };

const checks = {
  async 'models are listed and retrieved'() {
    const list = await client.models.list();
    assert.equal(list.data.length, 1);
    assert.equal(list.data[0].id, model);
    assert.equal(list.data[0].object, 'model');
    assert.ok(list.data[0].max_model_len > 0);
    assert.deepEqual(await client.models.retrieve(model), list.data[0]);
  },

  async 'a chat completion'() {
    const { data, request_id, response } = await client.chat.completions.create(greedy).withResponse();
    assert.match(data.id, /^chatcmpl-[0-9a-f]{32}$/);
    assert.equal(data.object, 'chat.completion');
    assert.equal(data.model, model);
    assert.match(data.system_fingerprint, /^moesaic-/);
    assert.ok(Math.abs(data.created - Date.now() / 1000) < 600);
    assert.equal(data.choices.length, 1);
    const [choice] = data.choices;
    assert.equal(choice.index, 0);
    assert.equal(choice.message.role, 'assistant');
    assert.equal(typeof choice.message.content, 'string');
    assert.equal(choice.message.refusal, null);
    assert.equal(choice.logprobs, null);
    assert.ok(['stop', 'length'].includes(choice.finish_reason));
    checkUsage(data.usage, 1);
    assert.equal(response.status, 200);
    assert.ok(request_id);
  },

  async 'the same, streamed, is the same text'() {
    const whole = await client.chat.completions.create(greedy);
    const stream = await client.chat.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } });
    const chunks = [];
    for await (const chunk of stream) chunks.push(chunk);
    const last = chunks.pop();
    assert.deepEqual(last.choices, []);
    assert.deepEqual(last.usage, whole.usage);
    assert.equal(new Set([...chunks, last].map((c) => c.id)).size, 1);
    for (const chunk of chunks) {
      assert.equal(chunk.object, 'chat.completion.chunk');
      assert.equal(chunk.usage, null);
      assert.equal(chunk.choices.length, 1);
    }
    assert.deepEqual(chunks[0].choices[0].delta, { role: 'assistant', content: '' });
    assert.equal(chunks.map((c) => c.choices[0].delta.content ?? '').join(''), whole.choices[0].message.content);
    assert.deepEqual(chunks.map((c) => c.choices[0].finish_reason).filter(Boolean), [whole.choices[0].finish_reason]);
    assert.equal(chunks.at(-1).choices[0].finish_reason, whole.choices[0].finish_reason);
  },

  async 'the stream helper puts a stream together'() {
    const final = await client.chat.completions.stream({ ...greedy, n: 2 }).finalChatCompletion();
    const whole = await client.chat.completions.create(greedy);
    assert.equal(final.choices.length, 2);
    for (const choice of final.choices) assert.equal(choice.message.content, whole.choices[0].message.content);
  },

  async 'several choices'() {
    const answer = await client.chat.completions.create({ ...greedy, n: 3 });
    assert.deepEqual(answer.choices.map((c) => c.index), [0, 1, 2]);
    checkUsage(answer.usage, 3);
  },

  async 'a seed repeats a sampled answer'() {
    const sampled = { ...greedy, temperature: 1, top_p: 1, seed: 7 };
    const [first, second] = [await client.chat.completions.create(sampled), await client.chat.completions.create(sampled)];
    assert.equal(first.choices[0].message.content, second.choices[0].message.content);
  },

  async 'log-probabilities of a chat'() {
    const answer = await client.chat.completions.create({ ...greedy, logprobs: true, top_logprobs: 3 });
    const content = answer.choices[0].logprobs.content;
    assert.ok(content.length >= 1 && content.length <= answer.usage.completion_tokens);
    for (const token of content) {
      checkToken(token);
      assert.equal(token.top_logprobs.length, 3);
      token.top_logprobs.forEach(checkToken);
      const values = token.top_logprobs.map((t) => t.logprob);
      assert.deepEqual(values, [...values].sort((a, b) => b - a));
    }
  },

  async 'a text completion'() {
    const answer = await client.completions.create({ model, prompt: 'The cat', temperature: 0, max_tokens: 8 });
    assert.match(answer.id, /^cmpl-[0-9a-f]{32}$/);
    assert.equal(answer.object, 'text_completion');
    assert.equal(typeof answer.choices[0].text, 'string');
    checkUsage(answer.usage, 1);
    const stream = await client.completions.create({ model, prompt: 'The cat', temperature: 0, max_tokens: 8, stream: true });
    let text = '';
    for await (const chunk of stream) text += chunk.choices[0].text;
    assert.equal(text, answer.choices[0].text);
  },

  async 'several prompts, echo, log-probabilities'() {
    const prompt = ['The cat', 'A dog'];
    const answer = await client.completions.create({ model, prompt, temperature: 0, max_tokens: 4, echo: true, logprobs: 2, n: 2 });
    assert.deepEqual(answer.choices.map((c) => c.index), [0, 1, 2, 3]);
    answer.choices.forEach((choice, i) => {
      assert.ok(choice.text.startsWith(prompt[i >> 1]));
      const { tokens, token_logprobs, top_logprobs, text_offset } = choice.logprobs;
      for (const list of [token_logprobs, top_logprobs, text_offset]) assert.equal(list.length, tokens.length);
      assert.equal(token_logprobs[0], null);
      assert.ok(token_logprobs.slice(1).every((l) => l <= 0));
      assert.ok(top_logprobs.slice(1).every((top) => Object.keys(top).length >= 1));
      assert.equal(text_offset[0], 0);
      text_offset.forEach((offset, t) => assert.ok(t === 0 || offset >= text_offset[t - 1]));
    });
  },

  async 'token ids in and out'() {
    const answer = await client.completions.create({ model, prompt: [40, 41, 42], max_tokens: 4, return_token_ids: true });
    assert.deepEqual(answer.choices[0].prompt_token_ids, [40, 41, 42]);
    assert.ok(answer.choices[0].token_ids.every(Number.isInteger));
    assert.equal(answer.usage.prompt_tokens, 3);
  },

  async 'errors are of the right class and name the parameter'() {
    await refused({ temperature: 9 }, OpenAI.BadRequestError, 400, 'temperature', 'invalid_value');
    await refused({ temperature: 'hot' }, OpenAI.BadRequestError, 400, 'temperature', 'invalid_type');
    await refused({ messages: [] }, OpenAI.BadRequestError, 400, 'messages', 'invalid_value');
    await refused({ frobnicate: 1 }, OpenAI.BadRequestError, 400, 'frobnicate', 'unknown_parameter');
    await refused({ tools: [{ type: 'function', function: { name: 'f' } }] }, OpenAI.BadRequestError, 400, 'tools',
      'unsupported_parameter');
    await refused({ model: 'gpt-nothing' }, OpenAI.NotFoundError, 404, 'model', 'model_not_found');
    await refused({ max_tokens: 10_000_000 }, OpenAI.BadRequestError, 400, 'max_tokens', 'context_length_exceeded');
    await assert.rejects(client.models.retrieve('gpt-nothing'), OpenAI.NotFoundError);
    await assert.rejects(client.embeddings.create({ model, input: 'x' }), OpenAI.NotFoundError);
  },

  async 'a stream can be left'() {
    const stream = await client.chat.completions.create({ ...greedy, max_tokens: 200, ignore_eos: true, stream: true });
    for await (const chunk of stream) if (chunk) break;
    assert.equal((await client.chat.completions.create(greedy)).choices.length, 1);
  },
};

function checkUsage(usage, choices) {
  assert.ok(usage.prompt_tokens > 0);
  assert.ok(usage.completion_tokens >= choices);
  assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
}

function checkToken({ token, logprob, bytes }) {
  assert.equal(typeof token, 'string');
  assert.ok(logprob <= 0);
  const decoded = Buffer.from(bytes).toString('utf8');
  assert.equal(decoded, token);
}

async function refused(change, kind, status, param, code) {
  await assert.rejects(client.chat.completions.create({ ...greedy, ...change }), (error) => {
    assert.ok(error instanceof kind, `${error}`);
    assert.equal(error.status, status);
    assert.equal(error.param, param);
    assert.equal(error.code, code);
    assert.ok(error.requestID);
    return true;
  });
}

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok   ${name}`);
  } catch (error) {
    failed++;
    console.log(`FAIL ${name}\n${error.stack}`);
  }
}
console.log(`${Object.keys(checks).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
