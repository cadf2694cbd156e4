// A module hook: web-llm's file, with the TVM runtime inside it exported too. npm has no release of
// the runtime version that web-llm bundles, and a test of another version would prove little.

const FILE = "/@mlc-ai/web-llm/lib/index.js";
const NAME = "libExports$2";

export async function load(url, context, next) {
  const module = await next(url, context);
  if (!url.endsWith(FILE)) return module;
  const source = module.source.toString();
  if (!source.includes(`var ${NAME} = requireLib$2();`)) {
    throw new Error(`${FILE}: the bundled runtime is not where this version of web-llm has it`);
  }
  return { ...module, source: `${source}\nexport { ${NAME} as tvmjs };\n` };
}
