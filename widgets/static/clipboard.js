async function copied(text, el) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // no clipboard on a page served over plain HTTP: the old way still works there
    const area = document.createElement("textarea");
    area.value = text;
    el.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
