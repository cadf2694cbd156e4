// The example page in Chromium, used as a person would. Request on stdin: {url, chromium, seconds,
// scene, folder, webgpu?, ...}; the answer is what was seen, as JSON. Screenshots go to `folder`.

import path from "node:path";
import { killAfter, launch, listen, readRequest, stayLocal } from "./chromium.mjs";

const request = await readRequest();
killAfter(request.seconds);
const said = [];
const strangers = [];
const browser = await launch(request);
const context = await browser.newContext({
  viewport: request.viewport ?? { width: 1280, height: 860 },
  colorScheme: request.colorScheme ?? "light",
  reducedMotion: request.reducedMotion ?? "no-preference",
});
await stayLocal(context, request.url, strangers);
const page = await context.newPage();
page.setDefaultTimeout(request.seconds * 1000);
listen(page, said);
if (request.before) await page.addInitScript(request.before);

const shot = (name) => page.screenshot({ path: path.join(request.folder, `${name}.png`) });
const text = (selector) => page.locator(selector).innerText();
const visible = (selector) => page.locator(selector).isVisible();

async function load() {
  await page.goto(request.url);
  await page.locator("#load").waitFor();
  await shot("welcome");
  if (request.model) await page.selectOption("#model", request.model);
  await page.locator("#load").focus();
  await page.keyboard.press("Enter");
}

async function answered(count) {
  await page.locator(".message.assistant .foot .button").nth(count - 1).waitFor();
}

/** Controls without a name, from the browser's own accessibility tree. */
async function accessibility() {
  const session = await context.newCDPSession(page);
  const { nodes } = await session.send("Accessibility.getFullAXTree");
  const CONTROLS = ["button", "textbox", "combobox", "slider", "spinbutton", "progressbar", "link"];
  const shown = nodes.filter((node) => !node.ignored && CONTROLS.includes(node.role?.value));
  return {
    controls: shown.map((node) => `${node.role.value}: ${node.name?.value ?? ""}`),
    unnamed: shown.filter((node) => !node.name?.value?.trim()).map((node) => node.role.value),
    ...(await page.evaluate(() => ({
      language: document.documentElement.lang,
      headings: [...document.querySelectorAll("h1")].length,
      images: [...document.images].filter((image) => !image.hasAttribute("alt")).length,
      live: document.querySelectorAll('[aria-live="polite"]').length,
      landmarks: ["main", "header", "aside"].filter((name) => document.querySelector(name)),
    }))),
  };
}

/** What has the focus after each press of Tab, on a page that was just opened. */
async function tabs(count) {
  const found = [];
  for (let i = 0; i < count; i++) {
    await page.keyboard.press("Tab");
    found.push(await page.evaluate(() => document.activeElement.id || document.activeElement.className));
  }
  return found;
}

/** Contrast of the colours that carry text, by WCAG's formula. */
function contrasts() {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const hex = style.getPropertyValue(`--${name}`).trim().slice(1);
    const [r, g, b] = [0, 2, 4].map((at) => {
      const c = parseInt(hex.slice(at, at + 2), 16) / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const PAIRS = "text/page text/surface text/sunken text/accent-soft soft/page soft/surface soft/sunken " +
    "on-accent/accent on-accent/accent-strong accent/surface good/good-soft bad/bad-soft bad/surface " +
    "busy/busy-soft busy/page";
  return Object.fromEntries(
    PAIRS.split(" ").map((pair) => {
      const [a, b] = pair.split("/").map(light);
      return [pair, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    }),
  );
}

const SCENES = {
  // A whole conversation by keyboard.
  async conversation() {
    const seen = { states: [] };
    await load();
    await page.locator("#loading").waitFor();
    seen.loading = await page.evaluate(async () => {
      const marks = new Set();
      const labels = new Set();
      while (!document.getElementById("loading").hidden) {
        marks.add(document.getElementById("progress").value);
        labels.add(document.getElementById("loading-title").textContent);
        await new Promise((done) => setTimeout(done, 50));
      }
      return { marks: [...marks], labels: [...labels] };
    });
    await page.locator("#starters").waitFor();
    seen.states.push(await text("#state"));
    seen.focus = await page.evaluate(() => document.activeElement.id);
    seen.accessibility = await accessibility();
    await shot("ready");

    await page.fill("#max-tokens", String(request.tokens));
    await page.fill("#temperature", "0");
    // Every text that is announced, and how the answer grows.
    await page.evaluate(() => {
      globalThis.seen = { spoken: [], grown: [] };
      new MutationObserver(() => seen.spoken.push(document.getElementById("live").textContent)).observe(
        document.getElementById("live"),
        { childList: true, characterData: true, subtree: true },
      );
      new MutationObserver(() => {
        const answer = document.querySelector(".message.assistant .text");
        if (answer) seen.grown.push(answer.textContent.length);
      }).observe(document.getElementById("messages"), { childList: true, characterData: true, subtree: true });
    });
    await page.focus("#question");
    await page.keyboard.type(request.question);
    await page.keyboard.press("Enter");
    await page.locator(".message.assistant .text > *").first().waitFor();
    seen.states.push(await text("#state"));
    seen.stop = await visible("#stop");
    await shot("answering");
    await answered(1);
    Object.assign(seen, await page.evaluate(() => globalThis.seen));
    seen.states.push(await text("#state"));
    seen.question = await page.locator(".message.user .text").innerText();
    seen.answer = await page.locator(".message.assistant .text").innerText();
    seen.foot = await page.locator(".message.assistant .foot").innerText();
    seen.speed = [await text("#prefill"), await text("#decode")];
    // The browser measures when it next collects garbage, which it may put off for 20 s.
    await page.locator("#memory-rows").getByText("Scripts and WASM").waitFor();
    seen.memory = await text("#memory-rows");
    seen.device = await text("#device-rows");
    await shot("answered");

    // A second question in the same conversation, stopped by Escape.
    await page.fill("#max-tokens", "400");
    await page.fill("#question", request.question);
    await page.keyboard.press("Enter");
    await page.locator(".message.assistant").nth(1).locator(".text > *").first().waitFor();
    await page.keyboard.press("Escape");
    await answered(2);
    seen.stopped = await page.locator(".message.assistant").nth(1).locator(".foot").innerText();

    await page.click("#reset");
    await page.locator("#starters").waitFor();
    seen.left = await page.locator(".message").count();

    // The same question again must give the same answer, now with the settings kept by a reload.
    await page.fill("#max-tokens", String(request.tokens));
    await page.fill("#question", request.question);
    await page.keyboard.press("Enter");
    await answered(1);
    seen.again = await page.locator(".message.assistant .text").innerText();
    await page.reload();
    await page.locator("#load").waitFor();
    seen.kept = await page.inputValue("#max-tokens");
    seen.tabs = await tabs(12);
    return seen;
  },

  // A library that raises an error in the middle of an answer, and is loaded again.
  async stopped() {
    await context.route("**/worker.js", async (route) => {
      const answer = await fetch(route.request().url());
      const body = `${await answer.text()}\nglobalThis.handler = handler;`;
      await route.fulfill({ headers: Object.fromEntries(answer.headers), body });
    });
    await load();
    await page.locator("#starters").waitFor();
    await page.workers()[0].evaluate(() => {
      const [pipeline] = handler.engine.loadedModelIdToPipeline.values();
      pipeline.forwardDecodeToken = async function () {
        this.tvm.beginScope();
        this.embed(this.tvm.empty([2, 3, 4], "float32", this.device), this.params);
      };
    });
    await page.fill("#question", request.question);
    await page.keyboard.press("Enter");
    await page.locator("#problem").waitFor();
    const seen = {
      kind: await page.locator("#problem").getAttribute("data-kind"),
      text: await text("#problem"),
      question: await page.inputValue("#question"),
      workers: page.workers().length,
    };
    await page.click("#retry");
    await page.locator("#starters").waitFor();
    seen.state = await text("#state");
    return seen;
  },

  // Cancelling, and loading after that.
  async cancel() {
    await load();
    await page.locator("#cancel").waitFor();
    await page.waitForTimeout(300);
    await page.click("#cancel");
    await page.locator("#load").waitFor();
    const seen = { workers: page.workers().length, focus: await page.evaluate(() => document.activeElement.id) };
    await page.click("#load");
    await page.locator("#loading").waitFor();
    seen.again = await visible("#progress");
    return seen;
  },

  // A reason why nothing works.
  async problem() {
    if (request.load) await load();
    else await page.goto(request.url);
    await page.locator("#problem").waitFor();
    await shot(request.shot ?? "problem");
    return {
      kind: await page.locator("#problem").getAttribute("data-kind"),
      role: await page.locator("#problem").getAttribute("role"),
      text: await text("#problem"),
      focus: await page.evaluate(() => document.activeElement.id),
      asking: await page.locator("#question").isEnabled(),
      accessibility: await accessibility(),
    };
  },

  async looks() {
    await page.goto(request.url);
    await page.locator("#load").waitFor();
    await shot("looks");
    return {
      contrasts: await page.evaluate(contrasts),
      wider: await page.evaluate(() => document.documentElement.scrollWidth > innerWidth),
      animations: await page.evaluate(() => {
        document.getElementById("state").dataset.state = "busy";
        return getComputedStyle(document.getElementById("state"), "::before").animationName;
      }),
    };
  },
};

let answer;
try {
  answer = await SCENES[request.scene]();
} catch (error) {
  await shot("failed").catch(() => {});
  answer = { error: String(error.message ?? error) };
}
process.stdout.write(JSON.stringify({ ...answer, said, strangers }));
await browser.close();
process.exit(0);
