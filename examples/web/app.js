// The page: states (no model, loading, ready, answering, problem), settings and measurements.

import { checkFit, formatBytes, inspectDevice, Problem } from "./device.js";
import { Engine, explain } from "./engine.js";
import { markdown } from "./markdown.js";
import { Speaker } from "./speak.js";

const $ = (id) => document.getElementById(id);
const speaker = new Speaker($("live"));
const SETTINGS = "mlc-compile-chat";
const STARTERS = [
  "What is the capital of France?",
  "Explain a cache to a child.",
  "Write a haiku about compilers.",
  "List three uses of a paper clip.",
];
const NARROW = matchMedia("(max-width: 860px)");

let device = null;
let models = [];
let engine = null;
let loading = null; // AbortController of the present load
let answering = false;
let messages = []; // the conversation, without the system prompt
let retry = start;

// ---------------------------------------------------------------- states

function show(name) {
  for (const id of ["problem", "welcome", "loading", "starters"]) $(id).hidden = id !== name;
}

function setState(state, label) {
  $("state").dataset.state = state;
  $("state").textContent = label;
}

function controls() {
  const ready = Boolean(engine);
  $("question").disabled = !ready;
  $("send").disabled = !ready || answering;
  $("send").hidden = answering;
  $("stop").hidden = !answering;
  $("model-section").hidden = !ready;
  $("reset").disabled = !ready || (messages.length === 0 && !answering);
  $("question").placeholder = ready ? "Ask something" : "Load a model first";
}

function showProblem(problem, again, { keepMessages = false } = {}) {
  if (problem.detail) console.error(problem.detail);
  $("problem").dataset.kind = problem.kind;
  $("problem-title").textContent = problem.title;
  $("problem-text").textContent = problem.text;
  $("problem-list").replaceChildren(...problem.list.map((text) => item("li", text)));
  $("problem-list").hidden = problem.list.length === 0;
  $("problem-detail").textContent = problem.detail;
  $("problem-more").hidden = !problem.detail;
  $("problem-more").open = false;
  if (!keepMessages) $("messages").replaceChildren();
  show("problem");
  retry = again;
  $("retry").textContent = LABELS.get(again);
  setState("bad", "Not running");
  controls();
  $("problem").focus();
}

const LABELS = new Map([
  [start, "Try again"],
  [load, "Load the model again"],
  [backToModels, "Back to the models"],
]);

function item(name, text, className) {
  const node = document.createElement(name);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

function rows(id, pairs) {
  $(id).replaceChildren(
    ...pairs
      .filter(([, value]) => value !== undefined && value !== null && value !== "")
      .flatMap(([name, value, inner]) => [item("dt", name, inner && "inner"), item("dd", value)]),
  );
}

// ---------------------------------------------------------------- start: device and models

async function start() {
  setState("busy", "Starting");
  show(null);
  try {
    models = await fetchModels();
    renderModels();
    device = await inspectDevice();
    rows("device-rows", [
      ["Adapter", device.name],
      ["16-bit floats", device.features.has("shader-f16") ? "yes" : "no"],
      ["Subgroups", device.features.has("subgroups") ? "yes" : "no"],
      ["Largest binding", formatBytes(device.limits.maxStorageBufferBindingSize)],
    ]);
    await forgetOldVersions();
    setState("idle", "Not loaded");
    show("welcome");
    const wanted = new URLSearchParams(location.search).get("model");
    if (wanted && models.some(({ record }) => record.model_id === wanted)) await load();
  } catch (error) {
    showProblem(explain(error), start);
  }
  controls();
}

async function fetchModels() {
  let answer;
  try {
    answer = await fetch("/models.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    answer = await answer.json();
  } catch (error) {
    throw new Problem(
      "The local server does not answer",
      "The page could not ask it for its models.",
      {
        kind: "no-server",
        list: ["Start it again: python examples/web/serve.py DIR", "Then try again."],
        detail: String(error),
      },
    );
  }
  if (!answer.models.length) throw new Problem("There is no model", "The server has none to offer.");
  return answer.models;
}

function renderModels() {
  const wanted = new URLSearchParams(location.search).get("model") ?? $("model").value;
  $("model").replaceChildren(
    ...models.map(({ record, about }) => {
      const option = item("option", `${about.name} (${about.quantization ?? "unknown"})`);
      option.value = record.model_id;
      option.selected = record.model_id === wanted;
      return option;
    }),
  );
  renderFacts();
}

const chosen = () => models.find(({ record }) => record.model_id === $("model").value) ?? models[0];

function renderFacts() {
  const { record, about } = chosen();
  const sliding = about.sliding_window_size > 0;
  rows("facts", []);
  const facts = [
    ["Architecture", about.model_type],
    ["Quantisation", about.quantization],
    [sliding ? "Sliding window" : "Context window", `${sliding ? about.sliding_window_size : about.context_window_size} tokens`],
    ["Download", formatBytes(about.weights_bytes + about.library_bytes)],
    ["Memory, estimated", record.vram_required_MB && formatBytes(record.vram_required_MB * 1e6)],
  ];
  $("facts").replaceChildren(
    ...facts
      .filter(([, value]) => value)
      .map(([name, value]) => {
        const box = document.createElement("div");
        box.append(item("dt", name), item("dd", value));
        return box;
      }),
  );
  $("load-note").textContent = "It is fetched from the local server once and kept by the browser.";
  $("system").disabled = !about.takes_system;
  $("system").placeholder = about.system_message || "None";
  $("system-note").textContent = about.takes_system
    ? "Takes effect with the next question."
    : "This model's conversation template takes none.";
  renderMemory();
}

/** web-llm keeps everything by URL: what an earlier version of a model left is of no use. */
async function forgetOldVersions() {
  try {
    const present = models.map(({ record }) => new URL(record.model, location.origin).href);
    for (const name of ["webllm/model", "webllm/config", "webllm/wasm"]) {
      if (!(await caches.has(name))) continue;
      const cache = await caches.open(name);
      for (const { url } of await cache.keys()) {
        if (!present.some((base) => url.startsWith(base))) await cache.delete(url);
      }
    }
  } catch (error) {
    console.warn("The browser's cache could not be tidied:", error);
  }
}

// ---------------------------------------------------------------- loading

async function load() {
  const model = chosen();
  messages = [];
  gpuMemory = null;
  $("messages").replaceChildren();
  try {
    checkFit(device, model);
  } catch (error) {
    showProblem(error, backToModels);
    return;
  }
  const control = (loading = new AbortController());
  show("loading");
  setState("busy", "Loading");
  $("loading-name").textContent = model.about.name;
  progress({ label: "Starting", detail: "", percent: 0 });
  controls();
  $("loading-title").focus();
  speaker.say(`Loading ${model.about.name}`);
  const started = performance.now();
  try {
    engine = await Engine.load(model, {
      signal: control.signal,
      onProgress: (report) => loading === control && progress(report),
      onMemory: (memory) => {
        gpuMemory = memory;
        renderMemory();
      },
      onLost: (problem) => {
        engine?.close();
        engine = null;
        answering = false;
        showProblem(problem, backToModels, { keepMessages: true });
      },
    });
    loadSeconds = (performance.now() - started) / 1000;
    setState("ready", "Ready");
    show("starters");
    rows("speed-rows", [["Load", `${loadSeconds.toFixed(1)} s`]]);
    rows("model-rows", [
      ["Name", model.about.name],
      ["Quantisation", model.about.quantization],
    ]);
    controls();
    $("question").focus();
    speaker.say(`${model.about.name} is ready`);
    measure();
  } catch (error) {
    if (error.name === "AbortError") await backToModels();
    else showProblem(error, backToModels);
  } finally {
    if (loading === control) loading = null;
    controls();
  }
}

/** Gives up what is loaded, and offers the models again. */
async function backToModels() {
  engine?.close();
  engine = null;
  messages = [];
  gpuMemory = null;
  $("messages").replaceChildren();
  if (NARROW.matches) togglePanelQuietly(false);
  await start();
  $("load").focus();
}

function progress({ label, detail, percent }) {
  $("loading-title").textContent = label;
  $("loading-text").textContent = detail;
  $("progress").value = percent;
  $("percent").textContent = `${percent} %`;
}

// ---------------------------------------------------------------- conversation

function addMessage(role, text) {
  const node = document.createElement("li");
  node.className = `message ${role}`;
  node.append(item("span", role === "user" ? "You:" : "Answer:", "hidden"));
  const body = item("div", text, "text");
  const foot = item("div", "", "foot");
  node.append(body, foot);
  $("messages").append(node);
  return { node, body, foot };
}

function follow(force = false) {
  const box = $("scroll");
  // Someone who has scrolled up to read is left there.
  if (force || box.scrollHeight - box.scrollTop - box.clientHeight < 120) {
    box.scrollTo({ top: box.scrollHeight, behavior: "instant" });
  }
}

async function ask(question) {
  if (!engine || answering || !question.trim()) return;
  const current = engine;
  const settings = readSettings();
  answering = true;
  show(null);
  addMessage("user", question);
  const { node, body, foot } = addMessage("assistant", "");
  node.classList.add("running");
  messages.push({ role: "user", content: question });
  controls();
  setState("busy", "Answering");
  speaker.say("Answering");
  speaker.begin();
  follow(true);
  const system = !$("system").disabled && settings.system.trim();
  const all = system ? [{ role: "system", content: settings.system }, ...messages] : messages;
  let text = "";
  let pending = 0;
  let pieces = 0;
  let firstAt = 0;
  const draw = () => {
    pending = 0;
    body.replaceChildren(...markdown(text));
    follow();
  };
  try {
    for await (const part of current.ask(all, settings)) {
      text = part.text;
      if (part.finish) {
        finishMessage(foot, part, text, settings.maxTokens);
        const cut = part.finish === "abort" ? "Stopped." : "End of the answer.";
        speaker.end(text, cut);
      } else {
        pieces += 1;
        firstAt ||= performance.now();
        const seconds = (performance.now() - firstAt) / 1000;
        if (pieces > 1 && seconds > 0) $("decode").textContent = rate((pieces - 1) / seconds);
        pending ||= requestAnimationFrame(draw);
        speaker.update(text);
      }
    }
    messages.push({ role: "assistant", content: text });
    if (engine === current) setState("ready", "Ready");
  } catch (error) {
    const problem = explain(error);
    console.error(problem.detail || problem.message);
    node.classList.add("failed");
    foot.replaceChildren(item("span", `${problem.title}. ${problem.text}`));
    speaker.say(`${problem.title}. ${problem.text}`);
    // The question stays in the box to be sent again; the model's cache starts afresh.
    messages.pop();
    if (!$("question").value) $("question").value = question;
    if (engine === current && problem.kind === "stopped") {
      // A library that has trapped answers nothing any more.
      engine = null;
      current.close();
      showProblem(problem, load, { keepMessages: true });
    } else if (engine === current) {
      await current.reset().catch(() => {});
      setState("ready", "Ready");
    }
  } finally {
    cancelAnimationFrame(pending);
    draw();
    node.classList.remove("running");
    answering = false;
    controls();
    measure();
    if (document.activeElement === document.body || document.activeElement === $("stop")) {
      $("question").focus();
    }
  }
}

const rate = (value) =>
  Number.isFinite(value) ? value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0) : "–";

/** How an answer ended, where that is not of itself. */
function ending(finish, usage, maxTokens) {
  if (finish === "abort") return "stopped";
  if (finish !== "length") return "";
  return usage?.completion_tokens < maxTokens
    ? "cut off: the context window is full"
    : "cut off: the longest answer that the settings allow";
}

function finishMessage(foot, { finish, usage }, text, maxTokens) {
  const parts = [];
  if (usage) {
    const { prefill_tokens_per_s: prefill, decode_tokens_per_s: decode } = usage.extra;
    $("prefill").textContent = rate(prefill);
    $("decode").textContent = rate(decode);
    parts.push(`${usage.prompt_tokens} prompt tokens at ${rate(prefill)} tok/s`);
    parts.push(`${usage.completion_tokens} tokens at ${rate(decode)} tok/s`);
    rows("speed-rows", [
      ["Load", `${loadSeconds.toFixed(1)} s`],
      ["First token", `${usage.extra.time_to_first_token_s.toFixed(2)} s`],
      ["Prompt fed", `${usage.prompt_tokens} tokens`],
      ["Answer", `${usage.completion_tokens} tokens`],
    ]);
  }
  const copy = item("button", "Copy", "button quiet small");
  copy.type = "button";
  copy.setAttribute("aria-label", "Copy this answer");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Could not copy";
    }
    speaker.say(copy.textContent);
  });
  foot.replaceChildren(copy, ...parts.map((part) => item("span", part)));
  const end = ending(finish, usage, maxTokens);
  if (end) foot.append(item("span", end, "cut"));
}

async function reset() {
  if (answering) engine?.stop();
  while (answering) await new Promise((done) => setTimeout(done, 20));
  messages = [];
  $("messages").replaceChildren();
  await engine?.reset();
  show("starters");
  controls();
  $("question").focus();
  speaker.say("New conversation");
}

// ---------------------------------------------------------------- measurements

let gpuMemory = null;
let pageMemory = null;
let stored = null;
let loadSeconds = 0;

const PLAN = { weights: "Weights", kv_cache: "KV cache", workspace: "Workspace", reserve: "Reserve" };

function renderMemory() {
  const { record, about } = chosen();
  const plan = about.memory_plan ?? {};
  rows("memory-rows", [
    ["Device, estimated", record.vram_required_MB && formatBytes(record.vram_required_MB * 1e6)],
    ...Object.entries(PLAN)
      .filter(([key]) => plan[key])
      .map(([key, label]) => [label, formatBytes(plan[key]), true]),
    ["GPU buffers, now", gpuMemory && formatBytes(gpuMemory.bytes)],
    ["GPU buffers, at most", gpuMemory && formatBytes(gpuMemory.peak)],
    ["Scripts and WASM", pageMemory && formatBytes(pageMemory)],
    ["Kept by the browser", stored && formatBytes(stored)],
  ]);
}

async function measure() {
  try {
    stored = (await navigator.storage?.estimate())?.usage ?? null;
    renderMemory();
    // Chromium only, and it may take its time.
    if (crossOriginIsolated && performance.measureUserAgentSpecificMemory) {
      pageMemory = (await performance.measureUserAgentSpecificMemory()).bytes;
      renderMemory();
    }
  } catch (error) {
    console.warn("Memory could not be measured:", error);
  }
}

// ---------------------------------------------------------------- settings

function readSettings() {
  const whole = Math.round(Number($("max-tokens").value));
  return {
    system: $("system").value,
    temperature: Number($("temperature").value),
    topP: Number($("top-p").value),
    maxTokens: whole >= 1 ? whole : 512,
  };
}

function renderSettings() {
  const { temperature, topP } = readSettings();
  $("temperature-value").textContent = temperature.toFixed(2);
  $("top-p-value").textContent = topP.toFixed(2);
}

function initSettings() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    // Private browsing, or something that is not ours.
  }
  $("system").value = kept.system ?? "";
  $("temperature").value = kept.temperature ?? 0.7;
  $("top-p").value = kept.topP ?? 0.95;
  $("max-tokens").value = kept.maxTokens ?? 512;
  renderSettings();
  for (const id of ["system", "temperature", "top-p", "max-tokens"]) {
    $(id).addEventListener("input", () => {
      renderSettings();
      try {
        localStorage.setItem(SETTINGS, JSON.stringify(readSettings()));
      } catch {
        // They last as long as the page then.
      }
    });
  }
}

// ---------------------------------------------------------------- controls

function togglePanel(open) {
  $("panel").dataset.open = String(open);
  $("panel-toggle").setAttribute("aria-expanded", String(open));
  if (NARROW.matches) (open ? $("panel") : $("panel-toggle")).focus();
}

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function init() {
  initSettings();
  togglePanelQuietly(!NARROW.matches);
  NARROW.addEventListener("change", () => togglePanelQuietly(!NARROW.matches));
  $("starter-list").replaceChildren(
    ...STARTERS.map((text) => {
      const button = item("button", text, "button");
      button.type = "button";
      button.addEventListener("click", () => ask(text));
      const entry = document.createElement("li");
      entry.append(button);
      return entry;
    }),
  );
  $("model").addEventListener("change", renderFacts);
  $("load").addEventListener("click", load);
  $("change").addEventListener("click", backToModels);
  $("cancel").addEventListener("click", () => loading?.abort());
  $("retry").addEventListener("click", () => retry());
  $("reset").addEventListener("click", reset);
  $("stop").addEventListener("click", () => engine?.stop());
  $("panel-toggle").addEventListener("click", () => togglePanel($("panel").dataset.open !== "true"));
  $("panel-close").addEventListener("click", () => togglePanel(false));
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (answering || !engine) return;
    const question = $("question").value;
    $("question").value = "";
    grow();
    ask(question);
  });
  $("question").addEventListener("input", grow);
  $("question").addEventListener("keydown", (event) => {
    // An input method uses Enter for itself.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("composer").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (NARROW.matches && $("panel").dataset.open === "true") togglePanel(false);
    else if (answering) engine?.stop();
  });
  controls();
  start();
}

function togglePanelQuietly(open) {
  $("panel").dataset.open = String(open);
  $("panel-toggle").setAttribute("aria-expanded", String(open));
}

init();
