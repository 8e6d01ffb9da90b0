/** Keeps all files of the page, so that it works without a network. `assets.js` is written when the page is built. */

importScripts("assets.js");

const { version, files } = self.ASSETS;

addEventListener("install", (event) => {
  const requests = files.map((file) => new Request(file, { cache: "no-cache" })); // not those of an earlier version
  event.waitUntil(caches.open(version).then((cache) => cache.addAll(requests)).then(() => self.skipWaiting()));
});

addEventListener("activate", (event) => {
  const others = async () => (await caches.keys()).filter((name) => name !== version).map((name) => caches.delete(name));
  event.waitUntil(others().then((deleted) => Promise.all(deleted)).then(() => self.clients.claim()));
});

addEventListener("fetch", (event) => {
  const kept = caches.open(version).then((cache) => cache.match(event.request, { ignoreSearch: true }));
  event.respondWith(kept.then((answer) => answer ?? fetch(event.request)));
});
