// Embed Concept keeps the text of its concepts in its widget `data`, and shows what is in it.
import * as host from "./host.js";

const KIND = "PerfusionEmbedConcept";
const CONNECTED = "connected, else embedded";
const EMBEDDED = "embedded";
const MISSING = "What is connected asks for files that are not here: the embedded concepts are used.";
const LINE = 22;

/** The concepts of a text: word and size of each line. What the server will refuse is shown as unreadable. */
function conceptsIn(text) {
  const lines = String(text ?? "").split("\n").filter((line) => line.trim());
  return lines.map((line) => {
    const [prefix, , word, , , payload] = line.trim().split(/\s+/);
    const readable = prefix === "perfusion-concept" && payload;
    return { word: readable ? word : "unreadable", size: readable ? (payload.length * 3) / 4 : line.length };
  });
}

function kilobytes(size) {
  return `${Math.max(1, Math.round(size / 1000))} KB`;
}

function element(tag, text, style = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  Object.assign(made.style, style);
  return made;
}

function button(text, work) {
  const made = element("button", text, {
    flex: "1",
    padding: "2px 8px",
    border: "1px solid var(--border-color, #4e4e4e)",
    borderRadius: "4px",
    background: "var(--comfy-input-bg, #222)",
    color: "inherit",
    font: "inherit",
    cursor: "pointer",
  });
  made.addEventListener("click", work);
  return made;
}

/** Fills the node's own element anew. */
function draw(node) {
  const view = node.perfusionEmbedded;
  const data = host.widgetOf(node, "data");
  const found = conceptsIn(data.value);
  const total = found.reduce((sum, concept) => sum + concept.size, 0);
  const title = found.length ? `embedded ${kilobytes(total)}` : "Nothing is embedded yet: connect concepts and run.";
  const rows = [element("div", title, { color: "var(--descrip-text, #999)" })];
  for (const { word, size } of found) {
    const row = element("div", "", { display: "flex", justifyContent: "space-between", gap: "8px" });
    const name = element("span", word, { overflow: "hidden", textOverflow: "ellipsis" });
    row.append(name, element("span", kilobytes(size)));
    rows.push(row);
  }
  if (view.note) rows.push(element("div", view.note, { color: "var(--descrip-text, #999)", whiteSpace: "normal" }));
  const buttons = element("div", "", { display: "flex", gap: "6px", marginTop: "4px" });
  if (found.length) buttons.append(button("Clear", () => host.setValue(data, "")));
  buttons.append(
    button(view.asText ? "Hide text" : "Show text", () => {
      view.asText = !view.asText;
      host.show(data, view.asText);
      draw(node);
    }),
  );
  view.box.replaceChildren(...rows, buttons);
  view.height = LINE * (rows.length + (view.note ? 1 : 0)) + 66; // the button, and margins
  host.fit(node);
}

host.onNode(KIND, (node) => {
  const data = host.widgetOf(node, "data");
  if (!data) return;
  if (!node.perfusionEmbedded) {
    const box = element("div", "", {
      boxSizing: "border-box",
      padding: "6px 10px",
      fontSize: "12px",
      lineHeight: `${LINE}px`,
      color: "var(--input-text, #ddd)",
      overflow: "hidden",
      whiteSpace: "nowrap",
    });
    node.perfusionEmbedded = { box, height: LINE, asText: false, note: "" };
    host.addElement(node, "embedded", box, () => node.perfusionEmbedded.height);
  }
  host.show(data, node.perfusionEmbedded.asText);
  host.onChange(data, () => draw(node));
  host.onExecuted(node, (output) => {
    const [text] = output?.perfusion_embedded ?? [];
    if (typeof text === "string" && text !== data.value) host.setValue(data, text);
  });
  draw(node);
});

/** Rows of Load Concepts that are hidden or off are not asked for. */
function isUsed({ class_type: kind, inputs }, name) {
  const row = kind === "PerfusionLoadConcepts" && /^file_(\d+)$/.exec(name);
  return !row || (Number(row[1]) <= inputs.count && inputs[`on_${row[1]}`] !== false);
}

/** Whether a node of a prompt, and all before it, ask for files and choices that this ComfyUI has. */
async function isAvailable(prompt, id, seen = new Set()) {
  const entry = prompt[id];
  if (!entry || seen.has(id)) return true;
  seen.add(id);
  for (const [name, value] of Object.entries(entry.inputs)) {
    if (Array.isArray(value)) {
      if (!(await isAvailable(prompt, value[0], seen))) return false;
    } else if (typeof value === "string" && !/ \[(input|output|temp)\]$/.test(value) && isUsed(entry, name)) {
      if (!(await host.canChoose(entry.class_type, name, value))) return false;
    }
  }
  return true;
}

// The text goes to the server only where it is used: it would change the node's signature, and all behind it would be
// computed again. A graph that was made elsewhere may be connected to files that are not here.
host.onPrompt(`${KIND}.prompt`, async (prompt) => {
  for (const [id, { class_type: kind, inputs }] of Object.entries(prompt)) {
    if (kind !== KIND || !Array.isArray(inputs.concepts)) continue;
    const replaceable = inputs.use === CONNECTED && conceptsIn(inputs.data).length > 0;
    const missing = replaceable && !(await isAvailable(prompt, inputs.concepts[0]));
    if (missing || inputs.use === EMBEDDED) delete inputs.concepts;
    else if (typeof inputs.data === "string") inputs.data = "";
    const node = host.nodeOf(id);
    if (!node?.perfusionEmbedded) continue;
    node.perfusionEmbedded.note = missing ? MISSING : "";
    draw(node);
  }
});
