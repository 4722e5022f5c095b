// Train Concept of a workflow that is older than some of its inputs does what it did then.
import { onNode, setValue, widgetOf } from "./host.js";

const BEFORE = { scope: "prompt", focus: 1, companions: 0, timesteps: "uniform", key_rate: 0, preservation: 0 };

/** Whether a saved node has a value for a widget: by name, or by its place in the list of those that are saved. */
function has(node, saved, widget) {
  if (saved.widgets_values_named) return widget.name in saved.widgets_values_named;
  const kept = node.widgets.filter((each) => each.serialize !== false);
  return kept.indexOf(widget) < saved.widgets_values.length;
}

onNode("PerfusionTrainConcept", (node, saved) => {
  if (!Array.isArray(saved?.widgets_values)) return;
  for (const [id, value] of Object.entries(BEFORE)) {
    const widget = widgetOf(node, id);
    if (widget && !has(node, saved, widget)) setValue(widget, value);
  }
});
