// One loaded model in a worker of its own. Each load starts a new worker: ending it is the one way
// to give everything back when a load fails or is cancelled.

import { WebWorkerMLCEngine } from "/web-llm.js";
import { Problem } from "./device.js";

// web-llm reports progress as text; the shares are what the steps take of a first load.
const STEPS = [
  [/^Start to fetch/, "Fetching the weights", 0, 45],
  [/^Fetching param/, "Fetching the weights", 0, 45],
  [/^Loading model from cache/, "Moving the weights to the GPU", 45, 60],
  [/^Loading GPU shader/, "Compiling the GPU kernels", 60, 100],
  [/^Finish/, "Ready", 100, 100],
];

export function describeProgress({ text, progress }) {
  const [, label, from, to] = STEPS.find(([pattern]) => pattern.test(text)) ?? [0, "Loading", 0, 0];
  const count = text.match(/\[(\d+)\/(\d+)\]/);
  const megabytes = text.match(/(\d+)MB (fetched|loaded)/);
  const detail = [
    count && `${count[1]} of ${count[2]} ${from === 60 ? "kernels" : "files"}`,
    megabytes && `${megabytes[1]} MB`,
  ].filter(Boolean);
  const share = Number.isFinite(progress) ? Math.min(Math.max(progress, 0), 1) : 1;
  return { label, detail: detail.join(", "), percent: Math.round(from + (to - from) * share) };
}

/** An error of web-llm or of the library as a Problem. */
export function explain(error) {
  if (error instanceof Problem) return error;
  const detail = error?.stack && !String(error.stack).includes(error.message)
    ? `${error}\n${error.stack}`
    : String(error?.stack ?? error);
  const first = String(error?.message ?? error).split("\n").find(Boolean) ?? "";
  const known = [
    [/LibraryError/, "The model's library stopped", first.replace(/^LibraryError: /, "")],
    [/ArtifactManifestError.*(IDs differ|not match)/s, "The model's parts do not belong together",
      "The library was compiled for other weights than the ones served. Compile it again for this directory."],
    [/ArtifactManifestError/, "The model was refused", first.replace(/^\w+Error: /, "")],
    [/ShaderF16SupportError/, "The adapter has no 16-bit floats",
      "The model needs the WebGPU feature shader-f16. Compile it in a 32-bit scheme, such as q4f32_1."],
    [/maxBufferSize|maxStorageBuffer|maxCompute/, "The adapter's limits are too small", first],
    [/DeviceLost|device (was|is) lost/i, "The graphics device was lost",
      "Often the model needs more memory than there is. Close other tabs, or take a smaller model."],
    [/ContextWindowSizeExceeded/, "The conversation no longer fits",
      "It is longer than the model's context window. Start a new conversation."],
    [/Failed to fetch|NetworkError|Cache.*network|Request failed|addAll/i, "The server does not answer",
      "A file of the model could not be fetched. Is the server still running? Reload the page if the model was compiled anew."],
    [/QuotaExceeded/i, "The browser's storage is full",
      "There is no room to keep the weights. Free some space, or leave private browsing."],
  ];
  const [, title, text] = known.find(([pattern]) => pattern.test(detail)) ?? [
    0, "The library reported an error", first,
  ];
  return new Problem(title, text, { detail, kind: /LibraryError/.test(detail) ? "stopped" : "engine" });
}

export class Engine {
  /** Loads a model; the worker is ended when that fails or `signal` aborts. */
  static async load({ record }, { signal, onProgress, onMemory, onLost }) {
    const worker = new Worker("/worker.js", { type: "module" });
    const fail = {};
    const failed = new Promise((_, reject) => (fail.now = reject));
    const absolute = (path) => new URL(path, location.origin).href;
    let loaded = false;
    const abort = () => fail.now(new DOMException("cancelled", "AbortError"));
    try {
      worker.addEventListener("error", (event) => {
        event.preventDefault?.();
        fail.now(new Error(event.message || "the worker's script could not be loaded"));
      });
      // web-llm refuses messages that it does not know, so it sees only its own.
      const channel = { postMessage: (message) => worker.postMessage(message) };
      worker.addEventListener("message", (event) => {
        const { data } = event;
        if (data.kind) channel.onmessage?.(event);
        if (data.gpu) onMemory(data.gpu);
        if (data.lost !== undefined) {
          const problem = explain(new Error(`device was lost: ${data.lost}`));
          if (loaded) onLost(problem);
          else fail.now(problem);
        }
      });
      if (signal.aborted) abort();
      signal.addEventListener("abort", abort);
      const engine = new WebWorkerMLCEngine(channel, {
        appConfig: {
          model_list: [
            { ...record, model: absolute(record.model), model_lib: absolute(record.model_lib) },
          ],
        },
        initProgressCallback: (report) => onProgress(describeProgress(report)),
        logLevel: "WARN",
      });
      await Promise.race([engine.reload(record.model_id), failed]);
      loaded = true;
      failed.catch(() => {}); // from here on `onLost` reports
      return new Engine(worker, engine, record.model_id);
    } catch (error) {
      worker.terminate();
      throw error?.name === "AbortError" ? error : explain(error);
    } finally {
      signal.removeEventListener("abort", abort);
    }
  }

  constructor(worker, engine, modelId) {
    Object.assign(this, { worker, engine, modelId });
  }

  /**
   * Streams the answer to `messages`: yields {text} with all text so far and, at the end,
   * {finish, usage}.
   */
  async *ask(messages, { temperature, topP, maxTokens }) {
    let text = "";
    let finish = null;
    let usage = null;
    const stream = await this.engine.chat.completions.create({
      messages,
      temperature,
      top_p: topP,
      max_tokens: maxTokens,
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      usage = chunk.usage ?? usage;
      const [choice] = chunk.choices;
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      if (choice.delta?.content) {
        text += choice.delta.content;
        yield { text };
      }
    }
    yield { text, finish, usage };
  }

  stop() {
    this.engine.interruptGenerate();
  }

  /** Forgets the conversation in the cache. */
  async reset() {
    await this.engine.resetChat();
  }

  close() {
    this.worker.terminate();
  }
}
