// The little Markdown that models write, as DOM nodes: never as HTML text.
// Code fences, headings, lists, paragraphs; inline code, bold and italics.

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|(?<![\w*])\*([^\s*](?:[^*]*[^\s*])?)\*(?![\w*])/s;

function inline(text) {
  const nodes = [];
  while (text) {
    const found = INLINE.exec(text);
    if (!found) break;
    if (found.index) nodes.push(text.slice(0, found.index));
    const [whole, , code, bold, italic] = found;
    const element = document.createElement(code !== undefined ? "code" : bold !== undefined ? "strong" : "em");
    element.append(...(code !== undefined ? [code] : inline(bold ?? italic)));
    nodes.push(element);
    text = text.slice(found.index + whole.length);
  }
  if (text) nodes.push(text);
  return nodes;
}

function element(name, children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

/** Blocks of `text`; a code fence that is not closed yet reaches to the end. */
export function markdown(text) {
  const blocks = [];
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  let paragraph = [];
  let list = null;
  const flush = () => {
    const joined = paragraph.join("\n").trim();
    if (joined) blocks.push(element("p", inline(joined)));
    paragraph = [];
    list = null;
  };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)\s*$/.exec(line);
    if (fence) {
      flush();
      const code = [];
      while (++i < lines.length && !lines[i].trim().startsWith(fence[1])) code.push(lines[i]);
      const pre = element("pre", [element("code", [code.join("\n")])]);
      pre.tabIndex = 0; // long lines scroll, by keyboard too
      pre.setAttribute("role", "region");
      pre.setAttribute("aria-label", fence[2] ? `Code, ${fence[2]}` : "Code");
      blocks.push(pre);
      continue;
    }
    const heading = /^(#{1,6})\s+(.+)$/.exec(line);
    const item = /^\s*(?:([-*+])|(\d+)[.)])\s+(.+)$/.exec(line);
    if (heading) {
      flush();
      blocks.push(element(heading[1].length < 3 ? "h3" : "h4", inline(heading[2])));
    } else if (item) {
      const name = item[1] ? "ul" : "ol";
      if (list?.localName !== name) {
        flush();
        list = element(name, []);
        if (name === "ol" && item[2] !== "1") list.start = Number(item[2]);
        blocks.push(list);
      }
      list.append(element("li", inline(item[3])));
    } else if (!line.trim()) {
      const before = list;
      flush();
      list = before; // an empty line may stand between items
    } else {
      list = null;
      paragraph.push(line);
    }
  }
  flush();
  return blocks;
}
