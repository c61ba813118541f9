// A button that puts text on the clipboard, which only the browser can do.

async function copy(text) {
  if (navigator.clipboard !== undefined) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // pages that came over plain http have no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser refused");
}

export default {
  render({ model, el }) {
    const button = document.createElement("button");
    const said = document.createElement("span");
    button.type = "button";
    button.className = "jupyter-button widget-button jupyter-widgets";
    button.textContent = model.get("description");
    said.className = "qlab-said";
    said.setAttribute("role", "status");
    button.addEventListener("click", async () => {
      try {
        await copy(model.get("text"));
        said.textContent = `Copied ${model.get("text").split("\n").length} lines.`;
      } catch (error) {
        said.textContent = `Not copied (${error.message}): select the text and press Ctrl+C.`;
      }
    });
    el.append(button, said);
  },
};
