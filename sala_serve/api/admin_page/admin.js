// Replace the page's middle every two seconds; without scripts the page reloads itself instead.
"use strict";
const REFRESH_MS = 2000;
let isPressed = false; // a button that is replaced while it is pressed would lose its click
addEventListener("pointerdown", () => { isPressed = true; });
addEventListener("pointerup", () => { isPressed = false; });

async function refresh() {
  try {
    const response = await fetch("/", { signal: AbortSignal.timeout(10000) });
    if (response.redirected) return location.reload(); // the session is over
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const main = page.querySelector("main");
    if (!response.ok || main === null) throw new Error();
    if (!isPressed) document.querySelector("main").replaceWith(main);
    document.getElementById("stale").hidden = true;
  } catch {
    document.getElementById("stale").hidden = false;
  }
  setTimeout(refresh, REFRESH_MS);
}
setTimeout(refresh, REFRESH_MS);
