// Headless Chromium with its software WebGPU adapter, and nothing that phones home. Never lavapipe:
// Chromium crashes or hangs on it.

import { chromium } from "playwright-core";

const ALWAYS = [
  "--headless=new",
  "--no-sandbox", // containers run as root
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
];
const WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

/** webgpu: whether there is an adapter; without the flags Chromium on Linux offers none. */
export function launch({ chromium: executablePath, webgpu = true }) {
  const args = webgpu ? WEBGPU : [];
  return chromium.launch({
    executablePath,
    headless: true,
    timeout: 60000,
    args: [...ALWAYS, ...args],
  });
}

/** Ends this process if it is still there after `seconds`: a lost GPU process never answers. */
export function killAfter(seconds) {
  setTimeout(() => {
    process.stdout.write(JSON.stringify({ timeout: seconds }));
    process.exit(124);
  }, seconds * 1000).unref();
}

/** The request on stdin; the answer goes to stdout as JSON. */
export async function readRequest() {
  let text = "";
  for await (const piece of process.stdin) text += piece;
  return JSON.parse(text);
}

/** Collects what a page says, workers included. */
export function listen(page, into) {
  page.on("console", (message) => into.push(`${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => into.push(`pageerror: ${error.message}`));
  page.on("crash", () => into.push("crash"));
}

/** Answers nothing outside `origin`, and notes who asked. */
export async function stayLocal(context, origin, into) {
  await context.route("**/*", (route) => {
    const url = route.request().url();
    if (url.startsWith(origin) || url.startsWith("data:") || url.startsWith("blob:")) {
      return route.continue();
    }
    into.push(url);
    return route.abort();
  });
}
