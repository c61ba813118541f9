// A read-only text with a Copy button: only the browser can reach the clipboard.

async function copy(area) {
  if (navigator.clipboard !== undefined) return navigator.clipboard.writeText(area.value);
  area.select(); // pages that came over plain http have no clipboard
  if (!document.execCommand("copy")) throw new Error("the browser refused");
}

export default {
  render({ model, el }) {
    const area = document.createElement("textarea");
    const button = document.createElement("button");
    const said = document.createElement("span");
    const label = model.get("label");
    const show = () => (area.value = model.get("text"));
    el.classList.add("qlab-text");
    area.readOnly = true;
    area.spellcheck = false;
    area.setAttribute("aria-label", label);
    button.type = "button";
    button.className = "jupyter-button";
    button.textContent = `Copy ${label}`;
    said.setAttribute("role", "status");
    button.addEventListener("click", async () => {
      try {
        await copy(area);
        said.textContent = `Copied ${area.value.trimEnd().split("\n").length} lines.`;
      } catch (error) {
        said.textContent = `Not copied (${error.message}): select the text and press Ctrl+C.`;
      }
    });
    model.on("change:text", show);
    show();
    el.append(area, button, said);
    return () => model.off("change:text", show);
  },
};
