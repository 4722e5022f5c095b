// Load Concepts shows as many rows as its count says. Hidden rows keep their values and are ignored by the node.
import { fit, onChange, onNode, show, widgetOf } from "./host.js";

const ROWS = 8;
const FIELDS = ["file", "on", "strength", "bias", "temperature"];

function arrange(node) {
  const count = widgetOf(node, "count");
  for (let row = 1; row <= ROWS; row++) {
    for (const field of FIELDS) {
      const widget = widgetOf(node, `${field}_${row}`);
      if (widget) show(widget, row <= count.value);
    }
  }
  fit(node);
}

onNode("PerfusionLoadConcepts", (node) => {
  const count = widgetOf(node, "count");
  if (!count) return;
  onChange(count, () => arrange(node));
  arrange(node);
});
