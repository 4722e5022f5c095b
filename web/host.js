// The one place that knows ComfyUI's front end.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

/** Calls `work(node)` for each new node of a kind, and `work(node, saved)` when a saved graph has given it its values. */
export function onNode(kind, work) {
  app.registerExtension({
    name: `perfusion.${kind}`,
    nodeCreated(node) {
      if (node.comfyClass !== kind) return;
      const configured = node.onConfigure;
      node.onConfigure = function (...values) {
        const result = configured?.apply(this, values);
        work(this, values[0]);
        return result;
      };
      work(node);
    },
  });
}

/** The widget of an input, by its id. */
export function widgetOf(node, id) {
  return node.widgets?.find((widget) => widget.name === id);
}

/** Calls `work` after each change of a widget, once however often this is called. */
export function onChange(widget, work) {
  if (widget.perfusionWork) {
    widget.perfusionWork = work;
    return;
  }
  widget.perfusionWork = work;
  const before = widget.callback;
  widget.callback = function (...values) {
    const result = before?.apply(this, values);
    widget.perfusionWork();
    return result;
  };
}

/** Shows or hides a widget in both renderers; its value stays. */
export function show(widget, visible) {
  widget.hidden = !visible;
  widget.options ??= {};
  widget.options.hidden = !visible;
}

/** Makes the node as high as what it shows, keeping its width. */
export function fit(node) {
  node.setSize([node.size[0], node.computeSize()[1]]);
  node.graph?.setDirtyCanvas(true, true);
}

/** Sets a widget as its user would. */
export function setValue(widget, value) {
  widget.value = value;
  widget.callback?.(value);
}

/** Calls `work(output)` with what each run of a node shows, from the cache too; once however often this is called. */
export function onExecuted(node, work) {
  if (!node.perfusionExecuted) {
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      node.perfusionExecuted(output);
    };
  }
  node.perfusionExecuted = work;
}

/** Puts an element at the end of a node, as high as `height()` says; nothing of it is saved. */
export function addElement(node, name, element, height) {
  const options = { serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height };
  const widget = node.addDOMWidget(name, name, element, options);
  widget.serialize = false;
  return widget;
}

/** Calls `work(prompt)` with each prompt, in API format, before it is sent or exported; its changes go along. */
export function onPrompt(name, work) {
  app.registerExtension({
    name: `perfusion.${name}`,
    setup() {
      const before = app.graphToPrompt;
      app.graphToPrompt = async function (...values) {
        const result = await before.apply(this, values);
        await work(result.output);
        return result;
      };
    },
  });
}

/** The node of an id in a prompt, which is like 1:2:3 inside of subgraphs. */
export function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const step of String(id).split(":")) {
    node = graph?.getNodeById(step) ?? graph?.getNodeById(Number(step));
    graph = node?.subgraph;
  }
  return node;
}

/** Whether a value can be chosen for an input of a kind of node. Inputs that are free take any. */
export async function canChoose(kind, input, value) {
  const inputs = globalThis.LiteGraph.registered_node_types[kind]?.nodeData?.input;
  const [type, options] = inputs?.required?.[input] ?? inputs?.optional?.[input] ?? [];
  const choices = Array.isArray(type) ? type : options?.options;
  if (!choices || choices.includes(value)) return true;
  // Lists of uploaded files are short of those in folders, and of those that came since: the server is asked.
  if (!Object.keys(options ?? {}).some((key) => key.endsWith("_upload"))) return false;
  const [, folder, name] = /^(?:(.*)\/)?([^/]*)$/.exec(value);
  const query = new URLSearchParams({ filename: name, subfolder: folder ?? "", type: "input" });
  return (await api.fetchApi(`/view?${query}`, { method: "HEAD" })).ok;
}
