// The one place that knows ComfyUI's front end.
import { app } from "../../scripts/app.js";

/** Calls `work(node)` for each new node of a kind, and again when a saved graph has given it its values. */
export function onNode(kind, work) {
  app.registerExtension({
    name: `perfusion.${kind}`,
    nodeCreated(node) {
      if (node.comfyClass !== kind) return;
      const configured = node.onConfigure;
      node.onConfigure = function (...values) {
        const result = configured?.apply(this, values);
        work(this);
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
