// The frame of a view: names its region of the page, shows its errors (as text, never as HTML), and keeps its keys:
// JupyterLab's plain command keys ("d d" deletes the cell) must not fire there. Undo and redo go to Python.

const FIELDS = "input:not([type=checkbox]):not([type=radio]), textarea, select"; // these undo what is typed in them

function onKey(event, send) {
  if (event.defaultPrevented) return;
  const control = event.ctrlKey || event.metaKey;
  const name = event.key.toLowerCase();
  if (control && !event.altKey && (name === "z" || name === "y") && !event.target.matches(FIELDS)) {
    send({ kind: name === "y" || event.shiftKey ? "redo" : "undo" });
    event.preventDefault();
  }
  if (!control || event.defaultPrevented) event.stopPropagation();
}

export default {
  render({ model, el }) {
    let root = null;
    let waiting = 0;
    const key = (event) => onKey(event, (message) => model.send(message));
    const enter = () => {
      root = el.closest(".qlab-view");
      if (root === null) {
        waiting = requestAnimationFrame(enter); // widgets are put into the page a moment after they are rendered
        return;
      }
      if (root.parentElement.closest(".qlab-view") !== null) return; // the outermost view is the region
      root.setAttribute("role", "region");
      root.setAttribute("aria-label", model.get("label"));
      root.setAttribute("data-lm-suppress-shortcuts", "true");
      root.addEventListener("keydown", key);
    };
    const show = () => {
      const [kind, sentence, trace] = model.get("_shown");
      el.classList.toggle("qlab-error", kind !== "");
      el.style.display = kind === "" ? "none" : "";
      const bold = document.createElement("b");
      const folded = document.createElement("details");
      const summary = document.createElement("summary");
      const lines = document.createElement("pre");
      bold.textContent = kind;
      summary.textContent = "Traceback";
      lines.textContent = trace;
      folded.append(summary, lines);
      el.replaceChildren(...(kind === "" ? [] : [bold, `: ${sentence}`, ...(trace ? [folded] : [])]));
    };
    el.setAttribute("role", "alert");
    model.on("change:_shown", show);
    show();
    enter();
    return () => {
      model.off("change:_shown", show);
      cancelAnimationFrame(waiting);
      root?.removeEventListener("keydown", key);
    };
  },
};
