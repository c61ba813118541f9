// The browser's half of LayerGrid: the WAI-ARIA grid pattern on a native table. All text is set as text, never as
// HTML. Edits are only proposed here; a cell shows the new value, dimmed, until Python has answered.

const PATIENCE_MS = 700; // for the second digit of a number

const asNumber = (value) => (value === "Infinity" ? Infinity : value === "-Infinity" ? -Infinity : value);

/** Python's format specs of the form "+,.1f" with d, f, % or g. */
export function formatNumber(value, spec) {
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  const [, sign, comma, digits, type] = /^(\+?)(,?)(?:\.(\d+))?([df%g])$/.exec(spec || (Number.isInteger(value) ? "d" : ".4g"));
  const places = Number(digits ?? 6);
  if (type === "d") value = Math.round(value) + 0; // + 0 turns -0 into 0
  let text;
  if (type === "d") text = String(value);
  else if (type === "g") text = general(value, places);
  else text = (type === "%" ? value * 100 : value).toFixed(places);
  if (comma) text = text.replace(/^-?\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ","));
  return (sign && value >= 0 ? "+" : "") + text + (type === "%" ? "%" : "");
}

function general(value, digits) {
  const precision = Math.max(1, digits);
  const withoutZeros = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  const [mantissa, exponent] = value.toExponential(precision - 1).split("e");
  if (exponent >= -4 && exponent < precision) return withoutZeros(value.toFixed(precision - 1 - exponent));
  return `${withoutZeros(mantissa)}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`;
}

/** Words that all must occur, or globs on the whole row key, as Python's fnmatch reads them. */
export function matcher(filter) {
  const tests = filter.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    if (!/[*?[]/.test(word)) return (key, text) => text.includes(word);
    const pattern = word.replace(/\[!?[^\]]+\]|[\s\S]/g, (part) => {
      if (part === "*") return ".*";
      if (part === "?") return ".";
      if (part.length > 1) return part.replace("[!", "[^").replaceAll("\\", "\\\\");
      return part.replace(/[\\^$.|+(){}[\]]/, "\\$&");
    });
    const glob = new RegExp(`^${pattern}$`, "s");
    return (key) => glob.test(key);
  });
  return (key, text) => tests.every((test) => test(key, text));
}

const collator = new Intl.Collator(undefined, { numeric: true }); // layer10 comes after layer2

export function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return collator.compare(String(a), String(b));
}

function element(tag, className, attributes = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function parse(snapshot) {
  const { columns, rows, allowed } = structuredClone(snapshot);
  for (const { name, numeric } of columns) if (numeric) rows[name] = rows[name].map(asNumber);
  return { columns, rows, allowed, keys: rows[columns[0].name].map(String) };
}

class Grid {
  constructor(model, el, table, send) {
    this.model = model;
    this.send = send;
    this.el = el;
    this.sorting = null; // { column, direction }
    this.current = { row: 0, column: 0 }; // row -1 is the header
    this.anchor = null; // where a range of selected rows begins
    this.typed = null; // { row, column, text, timer }: digits waiting for the next one
    this.pending = new Map(); // edit id -> cells waiting for Python
    this.editIds = 0;
    this.buildFrame();
    this.load(table);
    this.follow = {
      "change:selected": () => this.showSelection(),
      "change:alert": () => this.showAlert(),
      "change:status": () => this.showStatus(),
      "change:label": () => this.grid.setAttribute("aria-label", model.get("label")),
      "change:height_px": () => this.scroll.style.setProperty("max-height", `${model.get("height_px")}px`),
      "change:filter": () => {
        if (this.search.value !== model.get("filter")) this.search.value = model.get("filter");
        this.applyFilter();
      },
    };
    for (const [event, react] of Object.entries(this.follow)) {
      model.on(event, react);
      react();
    }
  }

  dispose() {
    for (const [event, react] of Object.entries(this.follow)) this.model.off(event, react);
    clearTimeout(this.typed?.timer);
    clearTimeout(this.saving);
  }

  // ---- what is shown ----

  buildFrame() {
    this.el.classList.add("qlab-grid");
    this.el.addEventListener("keydown", (event) => {
      // Plain keys would be commands of JupyterLab ("d d" deletes the cell); Ctrl+S and its like are meant for it.
      if (event.defaultPrevented || !(event.ctrlKey || event.metaKey)) event.stopPropagation();
    });
    const tools = element("div", "qlab-grid-tools");
    this.search = element("input", "", { type: "search", "aria-label": "Filter rows", spellcheck: "false" });
    this.search.placeholder = "Filter: words or layer2.*";
    this.count = element("output", "", { "aria-live": "polite" });
    tools.append(this.search, this.count);
    this.scroll = element("div", "qlab-grid-scroll");
    this.grid = element("table", "", { role: "grid", "aria-multiselectable": "true" });
    this.head = element("thead");
    this.body = element("tbody");
    this.grid.append(this.head, this.body);
    this.empty = element("p", "qlab-grid-empty");
    this.scroll.append(this.grid, this.empty);
    this.alert = element("div", "qlab-grid-alert", { role: "alert" });
    const foot = element("div", "qlab-grid-foot");
    this.status = element("span", "", { role: "status" });
    this.hint = element("span", "qlab-grid-hint", { "aria-hidden": "true" });
    foot.append(this.status, this.hint);
    this.el.replaceChildren(tools, this.scroll, this.alert, foot);

    this.search.addEventListener("input", () => this.filterTyped());
    this.search.addEventListener("keydown", (event) => this.searchKey(event));
    this.grid.addEventListener("mousedown", (event) => this.mouseDown(event));
    this.grid.addEventListener("click", (event) => this.click(event));
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.grid.addEventListener("focusin", (event) => this.focused(event.target.closest("td, th")));
    this.grid.addEventListener("focusout", () => (this.hint.textContent = ""));
  }

  load(table) {
    const currentKey = this.table?.keys[this.current.row];
    const hadFocus = this.grid.contains(document.activeElement);
    clearTimeout(this.typed?.timer);
    this.typed = null;
    this.pending.clear();
    this.table = table;
    this.order = table.keys.map((_, row) => row);
    this.sorting = this.sorting && table.columns[this.sorting.column] ? this.sorting : null;
    this.buildHead();
    this.rows = table.keys.map((key, row) => this.buildRow(key, row));
    this.sort();
    this.applyFilter();
    this.showSelection();
    const kept = table.keys.indexOf(currentKey);
    const row = kept >= 0 ? kept : (this.visible()[0] ?? -1);
    this.current = { row, column: Math.min(this.current.column, table.columns.length - 1) };
    this.target(this.current)?.setAttribute("tabindex", "0");
    if (hadFocus) this.focus(this.current);
  }

  buildHead() {
    const { columns } = this.table;
    const rows = [];
    if (columns.some(({ group }) => group)) {
      const groups = element("tr", "qlab-grid-groups");
      for (let start = 0; start < columns.length; ) {
        let end = start + 1;
        while (end < columns.length && columns[end].group === columns[start].group) end++;
        const isNamed = columns[start].group !== "";
        const cell = element(isNamed ? "th" : "td", "", { colspan: end - start, ...(isNamed && { scope: "colgroup" }) });
        cell.textContent = columns[start].group;
        groups.append(cell);
        start = end;
      }
      rows.push(groups);
    }
    this.header = element("tr");
    for (const [i, column] of columns.entries()) {
      const cell = element("th", column.numeric ? "qlab-number" : "", { scope: "col" });
      cell.classList.toggle("qlab-starts-group", i > 0 && columns[i - 1].group !== column.group);
      const button = element("button", "", { type: "button", tabindex: "-1" });
      button.textContent = column.title;
      button.title = column.help;
      cell.append(button);
      this.header.append(cell);
    }
    this.head.replaceChildren(...rows, this.header);
  }

  buildRow(key, row) {
    const line = element("tr", "", { "data-row": key });
    line.row = row;
    for (const [i, column] of this.table.columns.entries()) {
      const cell = element(i === 0 ? "th" : "td", "", i === 0 ? { scope: "row" } : { role: "gridcell" });
      cell.tabIndex = -1;
      if (column.numeric) cell.classList.add("qlab-number");
      cell.classList.toggle("qlab-starts-group", i > 0 && this.table.columns[i - 1].group !== column.group);
      line.append(cell);
      this.fill(cell, row, i);
    }
    return line;
  }

  /** Show a cell's value. Returns whether it looks different now. */
  fill(cell, row, index) {
    const column = this.table.columns[index];
    const value = this.table.rows[column.name][row];
    const before = cell.dataset.value;
    const options = this.options(row, index);
    const readOnly = options === null;
    cell.classList.toggle("qlab-editable", !readOnly);
    cell.classList.remove("qlab-pending");
    if (readOnly) cell.setAttribute("aria-readonly", "true");
    else cell.removeAttribute("aria-readonly");
    let text;
    if (value === null) text = "";
    else if (typeof value === "boolean") text = value ? "✓" : "–";
    else text = typeof value === "number" ? formatNumber(value, column.format) : String(value);
    cell.dataset.value = text;
    if (column.editor?.kind === "flag" && !readOnly) {
      const box = element("input", "", { type: "checkbox", tabindex: "-1" });
      box.setAttribute("aria-label", `${column.title} of ${this.table.keys[row]}`);
      box.checked = value;
      cell.replaceChildren(box);
    } else if (index === 0) {
      const name = element("bdi");
      name.textContent = text;
      cell.replaceChildren(name);
      cell.title = text;
    } else {
      cell.textContent = text;
    }
    if (column.bar !== null) {
      const part = typeof value === "number" ? Math.min(1, Math.max(0, value / column.bar)) : 0;
      cell.classList.add("qlab-bar");
      cell.style.setProperty("--qlab-part", part);
    }
    return before !== text;
  }

  patch(cells, answered, notice) {
    const waiting = this.pending.get(answered) ?? [];
    this.pending.delete(answered);
    const different = [];
    for (const [name, changed] of Object.entries(cells)) {
      const index = this.table.columns.findIndex((column) => column.name === name);
      for (const row of Object.keys(changed)) {
        const cell = this.rows[row]?.cells[index];
        if (cell === undefined || cell.querySelector("select, input:not([type=checkbox])")) continue;
        if (this.fill(cell, Number(row), index)) different.push(cell);
      }
    }
    this.flash(different);
    for (const cell of waiting) this.fill(cell, cell.parentNode.row, cell.cellIndex); // a refused edit: the old value
    if (notice !== undefined) this.showStatus(notice);
  }

  /** Only where it can be seen: hundreds of animations, each frame of which is painted, would slow everything else. */
  flash(cells) {
    const { top, bottom } = this.scroll.getBoundingClientRect();
    const seen = cells.filter((cell) => {
      const box = cell.getBoundingClientRect();
      return box.bottom > top && box.top < bottom;
    });
    for (const cell of seen) cell.classList.remove("qlab-flash");
    void seen[0]?.offsetWidth; // one layout for all lets their animations start again
    for (const cell of seen) cell.classList.add("qlab-flash");
  }

  showSelection() {
    const selected = new Set(this.model.get("selected"));
    this.rows.forEach((line, row) => line.setAttribute("aria-selected", selected.has(this.table.keys[row])));
    this.showCount();
  }

  showCount() {
    const total = this.rows.length;
    const shown = this.visible().length;
    const selected = this.rows.filter(isSelected);
    const hidden = selected.filter((line) => line.hidden).length;
    const counted = shown === total ? `${total} row${total === 1 ? "" : "s"}` : `${shown} of ${total} rows`;
    const chosen = selected.length ? ` · ${selected.length} selected` : "";
    this.count.textContent = counted + chosen + (hidden ? `, ${hidden} of them hidden` : "");
    this.empty.textContent = shown === 0 && total > 0 ? `No row matches “${this.search.value}”.` : "";
    this.grid.setAttribute("aria-rowcount", total + this.head.rows.length);
  }

  showAlert() {
    this.alert.textContent = this.model.get("alert");
    this.alert.hidden = this.alert.textContent === "";
  }

  showStatus(notice = "") {
    this.status.textContent = notice || this.model.get("status");
  }

  // ---- order, filter, places ----

  /** Rows as they stand in the table, without those that the filter hides. */
  visible() {
    return this.order.filter((row) => !this.rows[row].hidden);
  }

  sort() {
    const { column, direction } = this.sorting ?? {};
    this.order = this.table.keys.map((_, row) => row);
    if (this.sorting) {
      const values = this.table.rows[this.table.columns[column].name];
      this.order.sort((a, b) => {
        if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null) || a - b;
        return compare(values[a], values[b]) * direction || a - b;
      });
    }
    for (const [i, cell] of [...this.header.cells].entries()) {
      if (i !== column) cell.removeAttribute("aria-sort");
      else cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    }
    this.body.replaceChildren(...this.order.map((row) => this.rows[row]));
  }

  sortBy(column) {
    if (this.sorting?.column !== column) this.sorting = { column, direction: 1 };
    else if (this.sorting.direction === 1) this.sorting = { column, direction: -1 };
    else this.sorting = null;
    this.sort();
  }

  applyFilter() {
    const matches = matcher(this.search.value);
    const { columns, rows, keys } = this.table;
    const words = columns.filter(({ numeric }) => !numeric).map(({ name }) => rows[name]);
    this.rows.forEach((line, row) => {
      const text = words.map((values) => values[row]).join("\n").toLowerCase();
      line.hidden = !matches(keys[row].toLowerCase(), text);
    });
    this.showCount();
  }

  filterTyped() {
    this.applyFilter();
    clearTimeout(this.saving);
    this.saving = setTimeout(() => {
      this.model.set("filter", this.search.value);
      this.model.save_changes();
    }, 200);
  }

  searchKey(event) {
    if (event.key === "Escape" && this.search.value) {
      this.search.value = "";
      this.filterTyped();
    } else if (event.key === "ArrowDown" || event.key === "Enter") {
      this.focus({ row: this.visible()[0] ?? -1, column: 0 });
    } else {
      return;
    }
    event.preventDefault();
  }

  target({ row, column }) {
    return row < 0 ? this.header.cells[column]?.firstChild : this.rows[row]?.cells[column];
  }

  placeOf(cell) {
    return { row: cell.closest("thead") ? -1 : cell.parentNode.row, column: cell.cellIndex };
  }

  focus(place) {
    this.target(place)?.focus();
  }

  focused(cell) {
    if (cell === null || cell.closest(".qlab-grid-groups")) return;
    this.target(this.current)?.setAttribute("tabindex", "-1");
    this.current = this.placeOf(cell);
    this.target(this.current).setAttribute("tabindex", "0");
    const { row, column } = this.current;
    const editor = row < 0 || this.options(row, column) === null ? null : this.table.columns[column].editor;
    const hints = { choice: "Enter for the list", flag: "Enter to switch", number: "type a number", text: "Enter to edit" };
    const digits = editor?.kind === "choice" && editor.values.some((value) => typeof value === "number");
    this.hint.textContent = row < 0 ? "Enter to sort" : editor ? (digits ? "type digits, or Enter for the list" : hints[editor.kind]) : "";
  }

  /** The place some rows down and some columns to the right, the header being above the first row. */
  moved({ row, column }, down, right) {
    const lines = [-1, ...this.visible()];
    const at = Math.max(0, lines.indexOf(row)) + down;
    const first = down < -1 ? 1 : 0; // PageUp and Ctrl+Home stop at the first row
    const line = lines[Math.min(lines.length - 1, Math.max(Math.min(first, lines.length - 1), at))];
    return { row: line, column: Math.min(this.table.columns.length - 1, Math.max(0, column + right)) };
  }

  page() {
    const height = this.rows[this.visible()[0]]?.offsetHeight || 20;
    return Math.max(1, Math.floor((this.scroll.clientHeight - this.head.offsetHeight) / height) - 1);
  }

  // ---- keyboard and mouse ----

  key(event) {
    const cell = event.target.closest("td, th");
    if (cell === null || event.target.matches("select, input:not([type=checkbox])")) return;
    const place = this.placeOf(cell);
    const control = event.ctrlKey || event.metaKey;
    const name = control ? `Control+${event.key.toLowerCase()}` : event.key;
    const page = this.page();
    const far = 1e6;
    const moves = {
      ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1],
      PageDown: [page, 0], PageUp: [-page, 0], Home: [0, -far], End: [0, far],
      "Control+home": [-far, -far], "Control+end": [far, far],
    };
    const actions = {
      Enter: () => this.activate(place, cell),
      F2: () => this.activate(place, cell),
      " ": () => (place.row < 0 ? this.sortBy(place.column) : this.select(place.row, { toggle: true })),
      Escape: () => this.escape(),
      "Control+a": () => this.saveSelection(this.visible().map((row) => this.table.keys[row])),
      "Control+z": () => this.send({ kind: event.shiftKey ? "redo" : "undo" }),
      "Control+y": () => this.send({ kind: "redo" }),
    };
    if (this.typedKey(event, place, cell, control)) {
      // it was part of a number
    } else if (name in moves) {
      const next = this.moved(place, ...moves[name]);
      if (event.shiftKey && next.row !== place.row && next.row >= 0) {
        this.anchor ??= place.row;
        this.select(next.row, { range: true });
      }
      this.focus(next);
    } else if (name in actions) {
      actions[name]();
    } else {
      return;
    }
    event.preventDefault();
  }

  mouseDown(event) {
    const cell = event.target.closest("td, th");
    this.wasFocused = cell !== null && cell === document.activeElement;
    if (event.shiftKey) event.preventDefault(); // would select text
  }

  click(event) {
    const cell = event.target.closest("td, th");
    if (cell === null || cell.closest(".qlab-grid-groups") || event.target.matches("select, input:not([type=checkbox])")) return;
    const place = this.placeOf(cell);
    if (place.row < 0) {
      this.focus(place);
      this.sortBy(place.column);
      return;
    }
    const toggle = event.ctrlKey || event.metaKey;
    const editable = this.options(place.row, place.column) !== null;
    if (event.target.type === "checkbox") {
      event.preventDefault(); // Python decides
      cell.focus();
      this.activate(place, cell);
    } else if (editable && this.wasFocused && !toggle && !event.shiftKey) {
      this.activate(place, cell);
    } else {
      // A click on a value within a selection keeps it: the next click edits all selected rows.
      if (toggle || event.shiftKey || !editable || !isSelected(cell.parentNode)) {
        this.select(place.row, { toggle, range: event.shiftKey });
      }
      cell.focus();
    }
  }

  escape() {
    if (this.model.get("alert")) {
      this.model.set("alert", "");
      this.model.save_changes();
    } else {
      this.saveSelection([]);
    }
  }

  select(row, { toggle = false, range = false } = {}) {
    const key = this.table.keys[row];
    const selected = this.model.get("selected");
    if (range && this.anchor !== null) {
      const visible = this.visible();
      const ends = [visible.indexOf(this.anchor), visible.indexOf(row)];
      const between = visible.slice(Math.max(0, Math.min(...ends)), Math.max(...ends) + 1);
      this.saveSelection(between.map((one) => this.table.keys[one]));
      return;
    }
    this.anchor = row;
    if (!toggle) this.saveSelection([key]);
    else if (selected.includes(key)) this.saveSelection(selected.filter((one) => one !== key));
    else this.saveSelection([...selected, key]);
  }

  saveSelection(keys) {
    if (keys.join("\n") === this.model.get("selected").join("\n")) return;
    this.model.set("selected", keys);
    this.model.save_changes();
  }

  // ---- edits ----

  /** What a cell takes: null if nothing, a list for choices, an empty list for other editors. */
  options(row, index) {
    const { name, editor } = this.table.columns[index];
    const limit = this.table.allowed[name]?.[row];
    if (editor === null || limit?.length === 0) return null;
    return editor.kind === "choice" ? (limit ?? editor.values) : [];
  }

  activate(place, cell) {
    if (place.row < 0) return this.sortBy(place.column);
    const options = this.options(place.row, place.column);
    if (options === null) return undefined;
    const { name, editor } = this.table.columns[place.column];
    if (editor.kind === "flag") return this.propose(place, !this.table.rows[name][place.row]);
    return this.open(place, cell, editor.kind === "choice" ? options : null);
  }

  /** Put a native select or input into the cell. */
  open(place, cell, options, start) {
    const { name, title } = this.table.columns[place.column];
    const value = this.table.rows[name][place.row];
    const before = value === null ? "" : String(value);
    const field = element(options ? "select" : "input", "", { "aria-label": `${title} of ${this.table.keys[place.row]}` });
    for (const option of options ?? []) field.add(new Option(option, option, false, String(option) === before));
    if (options && !options.map(String).includes(before)) field.selectedIndex = -1;
    if (!options) {
      field.value = start ?? before;
      field.size = Math.max(4, before.length);
    }
    cell.replaceChildren(field);
    field.focus();
    if (!options && start === undefined) field.select();
    let closed = false;
    const close = (commit, refocus) => {
      if (closed) return;
      closed = true;
      const typed = field.value;
      this.fill(cell, place.row, place.column);
      if (commit && typed !== before && !(options && field.selectedIndex < 0)) this.propose(place, typed);
      if (refocus) cell.focus();
    };
    if (options) field.addEventListener("change", () => close(true, true));
    field.addEventListener("blur", () => close(true, false));
    field.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter" || event.key === "Escape") {
        event.preventDefault();
        close(event.key === "Enter", true);
      }
    });
    try {
      if (options) field.showPicker();
    } catch {
      // without a recent click or key the list stays closed; the arrow keys still choose
    }
  }

  /** Digits choose a value by its number: "1" then "6" is 16. Returns whether the key was used. */
  typedKey(event, place, cell, control) {
    const waiting = this.typed;
    if (waiting && (event.key === "Enter" || event.key === "Escape" || event.key === "Backspace")) {
      this.endTyping(event.key === "Enter");
      return true;
    }
    const options = place.row < 0 ? null : this.options(place.row, place.column);
    const { editor } = this.table.columns[place.column];
    const plain = event.key.length === 1 && !control && !event.altKey && event.key !== " ";
    if (options !== null && plain && editor.kind === "choice" && /^\d$/.test(event.key)) {
      const same = waiting?.row === place.row && waiting.column === place.column;
      if (waiting && !same) this.endTyping(true);
      clearTimeout(waiting?.timer);
      const text = (same ? waiting.text : "") + event.key;
      const couldGrow = options.some((option) => String(option) !== text && String(option).startsWith(text));
      this.typed = { ...place, text, timer: setTimeout(() => this.endTyping(true), PATIENCE_MS) };
      cell.textContent = text;
      cell.classList.add("qlab-pending");
      if (!couldGrow) this.endTyping(true);
      return true;
    }
    if (waiting) this.endTyping(true);
    if (options !== null && plain && (editor.kind === "number" || editor.kind === "text")) {
      this.open(place, cell, null, event.key);
      return true;
    }
    return false;
  }

  endTyping(commit) {
    const { text, timer, ...place } = this.typed;
    clearTimeout(timer);
    this.typed = null;
    this.fill(this.target(place), place.row, place.column);
    if (commit) this.propose(place, text);
  }

  /** Send an edit of this row, or of all visible selected rows if it is one of them. */
  propose(place, value) {
    const selected = this.visible().filter((row) => isSelected(this.rows[row]));
    const rows = selected.includes(place.row) ? selected : [place.row];
    const id = ++this.editIds;
    const cells = rows.filter((row) => this.options(row, place.column) !== null).map((row) => this.rows[row].cells[place.column]);
    for (const cell of cells) {
      if (typeof value === "boolean") cell.firstChild.checked = value;
      else cell.textContent = value;
      cell.classList.add("qlab-pending");
    }
    this.pending.set(id, cells);
    const { columns, keys } = this.table;
    const keysToEdit = [place.row, ...rows.filter((row) => row !== place.row)].map((row) => keys[row]);
    this.send({ kind: "edit", id, rows: keysToEdit, column: columns[place.column].name, value });
  }
}

/** Messages carry their number, since a kernel may handle them in another order. */
function numbered(model) {
  const browser = Math.random().toString(36).slice(2);
  let number = 0;
  return (message) => model.send({ ...message, turn: [browser, number++] });
}

const isSelected = (line) => line.getAttribute("aria-selected") === "true";

export default () => {
  let table, send;
  const grids = new Set();
  return {
    initialize({ model }) {
      table = parse(model.get("_snapshot"));
      send = numbered(model);
      model.on("msg:custom", ({ kind, cells, answered, notice, snapshot }) => {
        if (kind === "reset") {
          table = parse(snapshot);
          for (const grid of grids) grid.load(table);
        } else if (kind === "patch") {
          for (const [name, changed] of Object.entries(cells)) {
            const { numeric } = table.columns.find((column) => column.name === name);
            for (const [row, value] of Object.entries(changed)) table.rows[name][row] = numeric ? asNumber(value) : value;
          }
          for (const grid of grids) grid.patch(cells, answered, notice);
        }
      });
    },
    render({ model, el }) {
      const grid = new Grid(model, el, table, send);
      grids.add(grid);
      return () => {
        grids.delete(grid);
        grid.dispose();
      };
    },
  };
};
