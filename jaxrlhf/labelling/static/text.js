// Texts of models and people as DOM nodes. Every node is made by createElement and filled by textContent, so that whatever
// a text holds, it stays text: nothing here parses HTML, makes a link or sets an attribute from a text.

const LONGEST = 40000; // characters shown at once; the rest on request
const MOST_WORDS = 3000; // per text, for marking differences

// Characters that change the order of others, or are not seen, are shown by their names.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2028\u2029\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function element(name, className) {
  const made = document.createElement(name);
  if (className) made.className = className;
  return made;
}

function addText(parent, text) {
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    parent.append(text.slice(from, found.index));
    const shown = element("span", "control");
    shown.textContent = "U+" + found[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
    parent.append(shown);
    from = found.index + found[0].length;
  }
  parent.append(text.slice(from));
}

// Code between backticks, **bold** and *italic*; everything else as it stands, links too.
const INLINE = /`([^`\n]{1,2000})`|\*\*([^*\n]{1,2000})\*\*|(?<![\w*])\*([^*\s][^*\n]{0,2000}?)\*(?![\w*])/g;

function addInline(parent, text) {
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    addText(parent, text.slice(from, found.index));
    const kind = found[1] !== undefined ? "code" : found[2] !== undefined ? "strong" : "em";
    const shown = element(kind);
    addText(shown, found[1] ?? found[2] ?? found[3]);
    parent.append(shown);
    from = found.index + found[0].length;
  }
  addText(parent, text.slice(from));
}

function block(name, lines, className) {
  const made = element(name, className);
  made.dir = "auto";
  addInline(made, lines.join("\n"));
  return made;
}

function code(lines) {
  const made = element("pre");
  made.dir = "ltr";
  addText(made, lines.join("\n"));
  return made;
}

const KINDS = [
  ["heading", /^#{1,6} +(.*)$/],
  ["quote", /^> ?(.*)$/],
  ["ul", /^ {0,3}[-*+] +(.*)$/],
  ["ol", /^ {0,3}\d{1,9}[.)] +(.*)$/],
];

function kindOf(line) {
  for (const [kind, pattern] of KINDS) {
    const found = line.length < 5000 && line.match(pattern);
    if (found) return [kind, found[1]];
  }
  return [line.trim() === "" ? "blank" : "text", line];
}

function list(kind, lines, items) {
  const made = element(kind);
  made.dir = "auto";
  if (kind === "ol") made.start = Number.parseInt(lines[0], 10) || 1;
  items.forEach((item) => made.append(block("li", [item])));
  return made;
}

export function markdown(text) {
  const made = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; ) {
    const fence = lines[at].match(/^ {0,3}(`{3,}|~{3,})/);
    if (fence) {
      let end = at + 1;
      while (end < lines.length && !lines[end].trimStart().startsWith(fence[1])) end += 1;
      const language = lines[at].slice(fence[0].length).trim();
      if (language) made.append(block("span", [language], "role"));
      made.append(code(lines.slice(at + 1, end)));
      at = end + 1;
      continue;
    }
    const [kind, first] = kindOf(lines[at]);
    const [from, group] = [at, [first]];
    at += 1;
    if (kind === "blank") continue;
    while (kind !== "heading" && at < lines.length && !/^ {0,3}(`{3,}|~{3,})/.test(lines[at])) {
      const [next, rest] = kindOf(lines[at]);
      if (next !== kind) break;
      group.push(rest);
      at += 1;
    }
    if (kind === "ul" || kind === "ol") made.append(list(kind, [lines[from].trim()], group));
    else if (kind === "quote") made.append(block("blockquote", group));
    else made.append(block("p", group, kind === "heading" ? "heading" : ""));
  }
  return made;
}

export function plain(text, marks) {
  const made = element("div", "plain");
  made.dir = "auto";
  if (!marks) addText(made, text);
  else
    for (const [piece, changed] of marks) {
      if (!changed) addText(made, piece);
      else {
        const shown = element("mark");
        addText(shown, piece);
        made.append(shown);
      }
    }
  return made;
}

// Plays frames of pixels on a canvas, over and over, at the pace of a segment of an episode.
export function animation(spec) {
  const [count, height, width] = spec.shape;
  const made = element("div", "animation");
  const canvas = element("canvas");
  [canvas.width, canvas.height] = [width, height];
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Animation of ${count} frames`);
  const place = element("input");
  Object.assign(place, { type: "range", min: 0, max: count - 1, value: 0 });
  place.setAttribute("aria-label", "Frame");
  const button = element("button", "more");
  button.type = "button";
  made.append(canvas, button, place);
  let frames = null;
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches && count > 1;
  const name = () => (button.textContent = playing ? "Pause" : "Play");
  const draw = () => {
    if (!frames) return;
    const image = new ImageData(width, height);
    const from = place.valueAsNumber * width * height * 3;
    for (let pixel = 0; pixel < width * height; pixel += 1) {
      for (let part = 0; part < 3; part += 1) image.data[4 * pixel + part] = frames[from + 3 * pixel + part];
      image.data[4 * pixel + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  };
  place.addEventListener("input", () => {
    playing = false;
    name();
    draw();
  });
  button.addEventListener("click", () => {
    playing = !playing;
    name();
  });
  name();
  const packed = Uint8Array.from(atob(spec.data), (letter) => letter.charCodeAt(0));
  new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer().then((buffer) => {
    frames = new Uint8Array(buffer);
    draw();
  });
  const timer = setInterval(() => {
    if (!canvas.isConnected) clearInterval(timer);
    else if (playing) {
      place.value = String((place.valueAsNumber + 1) % count);
      draw();
    }
  }, 1000 / spec.rate);
  return made;
}

function shorten(text) {
  if (text.length <= LONGEST) return [text, 0];
  // Not between the halves of a pair of surrogates.
  const cut = /[\ud800-\udbff]/.test(text[LONGEST - 1]) ? LONGEST - 1 : LONGEST;
  return [text.slice(0, cut), text.length - cut];
}

// Fills a node with turns. `marks` has the pieces of each turn if differences are marked.
export function showTurns(node, turns, { asMarkdown, marks }) {
  node.replaceChildren();
  turns.forEach((turn, index) => {
    const made = element("div", "turn");
    if (turn.role) {
      const role = element("span", "role");
      role.dir = "auto";
      addText(role, turn.role);
      made.append(role);
    }
    const fill = (text) => {
      const holder = element("div");
      holder.append(marks ? plain(text, marks[index]) : asMarkdown ? markdown(text) : plain(text));
      return holder;
    };
    const [text, left] = shorten(turn.text);
    let body = fill(text);
    if (turn.animation) body = animation(JSON.parse(turn.animation));
    else if (turn.text === "") {
      body = element("em", "role");
      body.textContent = "(empty)";
    }
    made.append(body);
    if (left) {
      const more = element("button", "more");
      more.type = "button";
      more.textContent = `Show ${left.toLocaleString("en")} more characters`;
      more.addEventListener("click", () => {
        const whole = plain(turn.text);
        whole.tabIndex = -1;
        body.replaceWith(whole);
        more.remove();
        whole.focus();
      });
      made.append(more);
    }
    node.append(made);
  });
  node.scrollTop = 0;
}

const words = (text) => text.match(/\s+|[\p{L}\p{N}\p{M}_]+|[^]/gu) ?? [];

// The longest common subsequence of words; of texts too long for it, what they share at both ends.
function common(a, b) {
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head += 1;
  let tail = 0;
  while (tail < a.length - head && tail < b.length - head && a.at(-1 - tail) === b.at(-1 - tail)) tail += 1;
  const [n, m] = [a.length - head - tail, b.length - head - tail];
  const inA = new Uint8Array(a.length).fill(1, 0, head).fill(1, a.length - tail);
  const inB = new Uint8Array(b.length).fill(1, 0, head).fill(1, b.length - tail);
  if (n > MOST_WORDS || m > MOST_WORDS) return [inA, inB];
  const lengths = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i -= 1)
    for (let j = m - 1; j >= 0; j -= 1)
      lengths[i][j] =
        a[head + i] === b[head + j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  for (let i = 0, j = 0; i < n && j < m; ) {
    if (a[head + i] === b[head + j]) {
      inA[head + i] = 1;
      inB[head + j] = 1;
      i += 1;
      j += 1;
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i += 1;
    else j += 1;
  }
  return [inA, inB];
}

function pieces(tokens, shared) {
  const joined = [];
  tokens.forEach((token, index) => {
    const changed = !shared[index];
    if (joined.length && joined.at(-1)[1] === changed) joined.at(-1)[0] += token;
    else joined.push([token, changed]);
  });
  return joined;
}

// Returns for both answers the pieces of each turn, [text, whether the other answer lacks it].
export function differences(left, right) {
  const marks = [[], []];
  for (let index = 0; index < Math.max(left.length, right.length); index += 1) {
    const sides = [left[index], right[index]].map((turn) => words(shorten(turn?.text ?? "")[0]));
    const shared = common(...sides);
    sides.forEach((tokens, side) => marks[side].push(pieces(tokens, shared[side])));
  }
  return marks;
}
