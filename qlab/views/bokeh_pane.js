// The browser's half of BokehPane: one unrendered master document per widget, one document per view of it.
// Python's patches go to all of them; what a person does in one view goes to Python, the master and the other views.

const PAUSE_MS = 50; // between two messages of a drag
const libraries = (globalThis.__qlab_bokehjs__ ??= new Map()); // version -> Promise of Bokeh, for all notebooks of the page

function loadBokeh(carrier) {
  const version = carrier.get("version");
  if (!libraries.has(version)) {
    const loading = evaluate(carrier.get("code"));
    loading.catch(() => libraries.delete(version));
    libraries.set(version, loading);
  }
  return libraries.get(version);
}

async function evaluate(gzipped) {
  const stream = new Blob([gzipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const scope = {}; // the bundle attaches itself to `this`: a Bokeh that the page has already stays untouched
  new Function(await new Response(stream).text()).call(scope);
  scope.Bokeh.set_log_level?.("warn");
  return scope.Bokeh;
}

const copyBuffer = (view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);

// Auto-ranges and measured sizes belong to each view: sent to Python they would come back as fixed values.
const isLocal = ({ model, attr }) =>
  (model?.type === "DataRange1d" && (attr === "start" || attr === "end")) || /^(inner|outer)_(width|height)$/.test(attr);

/** Keep the last of several changes of one attribute; a drag makes hundreds. */
function latest(events) {
  const kept = new Map();
  events.forEach((event, i) => {
    const key = event.kind === "ModelChanged" ? `${event.model.id} ${event.attr}` : i;
    kept.delete(key);
    kept.set(key, event);
  });
  return [...kept.values()];
}

/** Messages carry their number, since a kernel may handle them in another order. */
function numbered(model) {
  const browser = Math.random().toString(36).slice(2);
  let number = 0;
  return (message) => model.send({ ...message, turn: [browser, number++] });
}

/** Plain JSON of a patch that Bokeh made; binary arrays become base64. */
const asJSON = (patch) =>
  JSON.parse(JSON.stringify(patch, (_, value) => (typeof value?.to_base64 === "function" ? value.to_base64() : value)));

export default () => {
  let bokeh, master, ready, send;
  const early = []; // messages that arrive while BokehJS loads
  const views = new Set();

  const parse = (json) => bokeh.require("document").Document.from_json(json);

  function apply(patch, buffers, documents) {
    for (const document of documents) {
      document.apply_json_patch(structuredClone(patch), new Map(buffers.map(([id, bytes]) => [id, bytes.slice(0)])));
    }
  }

  function receive(message, buffers) {
    if (master === undefined) {
      early.push([message, buffers]);
    } else if (message.kind === "patch") {
      const named = message.buffers.map((id, i) => [id, copyBuffer(buffers[i])]);
      try {
        apply(JSON.parse(message.patch), named, [master, ...[...views].map((view) => view.document)]);
      } catch (error) {
        console.warn("qlab: a patch did not fit, asking for the whole document", error);
        send({ kind: "resync" });
      }
    } else if (message.kind === "document") {
      master = parse(JSON.parse(message.document));
      for (const view of views) view.draw();
    }
  }

  async function start(model, snapshot) {
    const id = model.get("_bokehjs").slice("IPY_MODEL_".length);
    bokeh = await loadBokeh(await model.widget_manager.get_model(id));
    master = parse(JSON.parse(snapshot));
    for (const [message, buffers] of early.splice(0)) receive(message, buffers);
  }

  function watch(view) {
    const { document } = view;
    let pending = [];
    let sentAt = -Infinity;
    const flush = () => {
      sentAt = performance.now();
      const events = latest(pending);
      pending = [];
      if (events.length === 0 || view.document !== document) return;
      const patch = asJSON(document.create_json_patch(events));
      send({ kind: "patch", patch });
      const changes = patch.events.filter((event) => event.kind !== "MessageSent");
      const others = [...views].filter((other) => other !== view).map((other) => other.document);
      if (changes.length > 0) apply({ events: changes }, [], [master, ...others]);
    };
    view.flush = flush;
    document.on_change((event) => {
      if (event.sync === false || isLocal(event)) return;
      if (pending.push(event) > 1) return;
      const wait = sentAt + PAUSE_MS - performance.now();
      if (wait > 0) setTimeout(flush, wait);
      else queueMicrotask(flush);
    });
  }

  return {
    initialize({ model }) {
      send = numbered(model);
      model.on("msg:custom", (message, buffers) => receive(message, buffers));
      // The snapshot is read now: one that comes while BokehJS loads holds changes that `early` holds as well.
      ready = start(model, model.get("_snapshot"));
      ready.catch(() => {}); // each view that waits for it shows the error
    },

    async render({ model, el }) {
      el.classList.add("qlab-pane");
      const canvas = document.createElement("div");
      const alert = document.createElement("div");
      alert.className = "qlab-alert";
      alert.setAttribute("role", "alert");
      const say = (sentence) => {
        alert.textContent = sentence;
        alert.hidden = sentence === "";
      };
      const showLabel = () => {
        el.setAttribute("role", model.get("label") ? "figure" : "none"); // a figure may bring a label of its own
        el.setAttribute("aria-label", model.get("label"));
      };
      const showAlert = () => say(model.get("alert"));
      canvas.textContent = "Loading the plot…";
      el.replaceChildren(canvas, alert);
      showLabel();
      showAlert();
      model.on("change:label", showLabel);
      model.on("change:alert", showAlert);

      const view = {
        async draw() {
          view.manager?.clear();
          canvas.replaceChildren();
          view.document = parse(master.to_json());
          watch(view);
          const { add_document_standalone } = bokeh.require("embed/standalone");
          view.manager = await add_document_standalone(view.document, canvas, [], false);
        },
        repaint() {
          for (const part of view.manager?.all_views() ?? []) {
            part.canvas?.primary?.clear?.(); // half-covered pixels at the edge would keep some of the old colour
            if (part.model?.type === "Legend") {
              part.rerender?.(); // an element of the page keeps the colours it was made with
              requestAnimationFrame(() => part.request_layout?.()); // it had no height until it was in the page again
            }
            part.request_repaint?.();
          }
        },
      };
      // Bokeh tells Python of the end of a drag only where a tool handled it, not where an annotation did.
      const ends = ["pointerup", "pointercancel"];
      const pressed = () => ends.forEach((end) => window.addEventListener(end, released, true)); // tools stop it on its way
      const released = () => {
        ends.forEach((end) => window.removeEventListener(end, released, true));
        setTimeout(() => {
          view.flush?.();
          send({ kind: "released" });
        }, PAUSE_MS);
      };
      canvas.addEventListener("pointerdown", pressed, true);
      let stopFollowing = () => {};
      try {
        await ready;
        views.add(view);
        await view.draw();
        stopFollowing = followTheme(el, view.repaint);
        el.dataset.ready = "true";
      } catch (error) {
        canvas.replaceChildren();
        say(`The plot could not be drawn: ${error}`);
        console.error(error);
      }
      return () => {
        stopFollowing();
        views.delete(view);
        view.manager?.clear();
        view.document = undefined;
        model.off("change:label", showLabel);
        model.off("change:alert", showAlert);
      };
    },
  };
};

/** Repaint once the colours have changed, which can be a while after the page has named its new theme. */
function followTheme(el, repaint) {
  const colours = () => {
    const style = getComputedStyle(el);
    return ["--jp-layout-color0", "--jp-ui-font-color0"].map((name) => style.getPropertyValue(name)).join();
  };
  let seen = colours();
  let timer = null;
  const look = (tries) => {
    if (colours() !== seen) {
      seen = colours();
      repaint();
    } else if (tries > 0) {
      timer = setTimeout(look, 50, tries - 1);
    }
  };
  const observer = new MutationObserver(() => {
    clearTimeout(timer);
    look(40);
  });
  const attributeFilter = ["data-jp-theme-light", "data-jp-theme-name", "class"];
  observer.observe(document.body, { attributes: true, attributeFilter });
  return () => {
    clearTimeout(timer);
    observer.disconnect();
  };
}
