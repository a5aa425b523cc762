// Three things that a node's schema cannot say to the page.
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const SAYS = { Tenuto_Loader: "report", Tenuto_Report: "text", Tenuto_Calibrate: "info", Tenuto_SavePrompt: "info", Tenuto_Export: "report" };
const WIDE = 240; // pixels: a node without fields is as narrow as its slots, and its title is cut off
const SHOWN = "shown"; // the field below; it is neither saved nor sent

function linked(node, name) {
  return node.outputs?.find((output) => output.name === name)?.links?.length > 0;
}

function show(node, text) {
  let field = node.widgets?.find((widget) => widget.name === SHOWN);
  if (!field) {
    field = ComfyWidgets.STRING(node, SHOWN, ["STRING", { multiline: true }], app).widget;
    field.serialize = false;
    field.options.serialize = false;
    if (field.inputEl) field.inputEl.readOnly = true;
    // Downwards alone: what is beside it stays in sight.
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1] + 100)]);
  }
  field.value = text;
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "Tenuto",
  beforeRegisterNodeDef(type, definition) {
    const output = SAYS[definition.name];
    if (!output) return;
    const executed = type.prototype.onExecuted;
    type.prototype.onExecuted = function (message) {
      executed?.apply(this, arguments);
      // What another node shows already is not shown twice.
      if (message?.text?.length && !linked(this, output)) show(this, message.text.join("\n"));
    };
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Tenuto_")) return;
    if (node.size[0] < WIDE) node.setSize([WIDE, node.size[1]]);
    if (node.comfyClass !== "Tenuto_Calibrate") return;
    // A stopped calibration goes on where the same graph is queued again: with another seed it is another one.
    const after = node.widgets?.find((widget) => widget.name === "control_after_generate");
    if (after) after.value = "fixed";
  },
});
