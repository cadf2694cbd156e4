// Stock web-llm in a page of Chromium, driven by a JSON request on stdin; JSON on stdout.
//
// Request: {url, chromium, seconds, webgpu?, steps: [...]}. `url` is a server of examples/web.
// Steps, each answered by one entry of `steps` ({error: text} when it throws):
//   {do: "load", model, record?, limits?}  load a model of /models.json; `record` changes fields of
//                                         its record (null removes one), `limits` what the device
//                                         says of its limits
//   {do: "ask", request, keep?}           a chat completion ({messages}) or completion ({prompt});
//                                         without `keep` the cache is emptied afterwards; a message
//                                         {answer: N} stands for the text of step N's answer
//   {do: "raise", times?}                 make the library raise an error of its own
//   {do: "reload"} {do: "unload"} {do: "close_while_loading", model} {do: "evaluate", code}
// An answer to "ask" has the tokens fed into the cache (`fed`: lists) and what the cache held before
// each (`cached`), the sampled `tokens`, the random numbers drawn (`uniforms`) and the grammar's
// masks, so that a reference can retrace it.

import { killAfter, launch, listen, readRequest, stayLocal } from "./chromium.mjs";

const request = await readRequest();
killAfter(request.seconds);
const console_ = [];
const strangers = [];
const browser = await launch(request);
const context = await browser.newContext();
await stayLocal(context, request.url, strangers);
const { models } = await (await fetch(`${request.url}models.json`)).json();

async function newPage() {
  const fresh = await context.newPage();
  listen(fresh, console_);
  // The page of the example has the headers of isolation; any file of its origin will do.
  await fresh.goto(`${request.url}favicon.svg`);
  await fresh.evaluate(install);
  return fresh;
}

/** Runs in the page. Puts `harness` there. */
async function install() {
  const webllm = await import("/web-llm.js");
  const engine = new webllm.MLCEngine({ appConfig: { model_list: [] }, logLevel: "INFO" });
  const harness = { engine, limits: null, trace: null };
  globalThis.harness = harness;
  if (globalThis.GPUAdapter) {
    const { requestDevice } = GPUAdapter.prototype;
    GPUAdapter.prototype.requestDevice = async function (descriptor) {
      const device = await requestDevice.call(this, descriptor);
      const limits = harness.limits;
      if (limits) {
        const real = device.limits;
        const told = new Proxy(real, {
          get: (_, name) => limits[name] ?? Reflect.get(real, name, real),
        });
        Object.defineProperty(device, "limits", { value: told });
      }
      return device;
    };
  }
  harness.pipeline = () => [...engine.loadedModelIdToPipeline.values()][0];

  harness.load = async (record, limits) => {
    harness.limits = limits;
    engine.setAppConfig({ model_list: [record] });
    const progress = [];
    engine.setInitProgressCallback(({ text }) => progress.push(text));
    const started = performance.now();
    try {
      await engine.reload(record.model_id);
    } catch (error) {
      return { error: String(error), progress };
    }
    const milliseconds = performance.now() - started;
    harness.watch(harness.pipeline());
    return { milliseconds, progress, ...(await harness.adapter()) };
  };

  harness.adapter = async () => {
    const adapter = await navigator.gpu?.requestAdapter();
    return {
      adapter: adapter ? [adapter.info.vendor, adapter.info.architecture].join(" ") : null,
      features: adapter ? [...adapter.features] : [],
    };
  };

  // Every token that goes into the cache and every token that comes out of the sampler.
  harness.watch = (pipeline) => {
    const trace = () => harness.trace;
    const { forwardPrefill, forwardDecodeToken, sampleFromRawLogits } = pipeline;
    pipeline.forwardPrefill = async function (...args) {
      trace()?.cached.push(this.filledKVCacheLength);
      const result = await forwardPrefill.apply(this, args);
      trace()?.fed.push([...result.promptTokenIds]);
      return result;
    };
    pipeline.forwardDecodeToken = async function (token) {
      trace()?.cached.push(this.filledKVCacheLength);
      const logits = await forwardDecodeToken.call(this, token);
      trace()?.fed.push([token]);
      return logits;
    };
    pipeline.sampleFromRawLogits = async function (...args) {
      const token = await sampleFromRawLogits.apply(this, args);
      trace()?.tokens.push(token);
      return token;
    };
    const random = pipeline.tvm.rng;
    const { randomFloat } = random;
    random.randomFloat = function () {
      const value = randomFloat.call(this);
      trace()?.uniforms.push(value);
      return value;
    };
    let matcher;
    Object.defineProperty(pipeline, "grammarMatcher", {
      get: () => matcher,
      set: (next) => {
        matcher = next;
        if (!next) return;
        const { getNextTokenBitmask } = next;
        next.getNextTokenBitmask = async function () {
          const mask = await getNextTokenBitmask.call(this);
          trace()?.masks.push([...mask]);
          return mask;
        };
      },
    });
  };

  harness.ask = async (body, keep) => {
    const trace = (harness.trace = { fed: [], cached: [], tokens: [], uniforms: [], masks: [] });
    const started = performance.now();
    const chat = "messages" in body;
    try {
      const answer = chat
        ? await engine.chat.completions.create(body)
        : await engine.completions.create(body);
      const [choice] = answer.choices;
      return {
        text: chat ? choice.message.content : choice.text,
        finish: choice.finish_reason,
        usage: answer.usage,
        milliseconds: performance.now() - started,
        ...trace,
      };
    } finally {
      harness.trace = null;
      if (!keep) await engine.resetChat();
    }
  };

  // A shape that the library's function refuses: what it throws passes through WASM and JS.
  harness.raise = async () => {
    const { tvm, vm, params } = harness.pipeline();
    tvm.beginScope();
    try {
      const embed = vm.getFunction("embed");
      embed(tvm.empty([2, 3, 4], "float32", tvm.webgpu()), params);
      return { raised: false };
    } finally {
      tvm.endScope();
    }
  };
}

function record({ model, record: changes = {} }) {
  const found = models.find((entry) => entry.record.model_id === model);
  if (!found) throw new Error(`the server has no model ${model}`);
  const merged = { ...found.record, ...changes };
  for (const key of ["model", "model_lib"]) merged[key] = new URL(merged[key], request.url).href;
  for (const [key, value] of Object.entries(merged)) if (value === null) delete merged[key];
  return merged;
}

const ACTIONS = {
  load: (step) =>
    page.evaluate(([r, limits]) => harness.load(r, limits), [record(step), step.limits ?? null]),
  ask: ({ request: body, keep }) => {
    const messages = body.messages?.map(({ answer, ...message }) =>
      answer === undefined ? message : { role: "assistant", content: steps[answer].text },
    );
    return page.evaluate(
      ([asked, kept]) => harness.ask(asked, kept),
      [messages ? { ...body, messages } : body, Boolean(keep)],
    );
  },
  raise: () => page.evaluate(() => harness.raise()),
  unload: () => page.evaluate(() => harness.engine.unload()),
  evaluate: (step) => page.evaluate(step.code),
  reload: async () => {
    await page.reload();
    await page.evaluate(install);
  },
  // The page goes away in the middle; a new one takes its place.
  close_while_loading: async (step) => {
    const begun = page.evaluate(
      (r) =>
        new Promise((resolve) => {
          harness.engine.setInitProgressCallback(({ text }) => resolve(text));
          harness.engine.setAppConfig({ model_list: [r] });
          harness.engine.reload(r.model_id).catch((error) => resolve(String(error)));
        }),
      record(step),
    );
    const text = await begun;
    await page.close();
    page = await newPage();
    return { at: text };
  },
};

let page = await newPage();
const steps = [];
for (const step of request.steps) {
  const mark = console_.length;
  let answer;
  try {
    answer = (await ACTIONS[step.do](step)) ?? {};
  } catch (error) {
    answer = { error: String(error.message ?? error) };
  }
  steps.push({ ...answer, console: console_.slice(mark) });
}
process.stdout.write(JSON.stringify({ steps, console: console_, strangers }));
await browser.close();
process.exit(0);
