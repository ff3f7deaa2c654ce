function render({ model, el }) {
  el.classList.add("wb-copy");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "jupyter-button";
  const draw = () => {
    button.textContent = model.get("label");
    button.disabled = !model.get("text");
    button.title = model.get("text");
  };
  button.onclick = async () => {
    button.textContent = (await copied(model.get("text"), el)) ? "Copied" : "Copying is not allowed here";
    setTimeout(draw, 1500);
  };
  model.on("change:text", draw);
  model.on("change:label", draw);
  draw();
  el.append(button);
}

export default { render };
