// The same work on node's `ws`: `node ws.js PORT MODE`; see servers.py.
const { WebSocketServer } = require("ws");

const [port, mode] = process.argv.slice(2);
const everyone = new Set();
const handlers = new Map([
  ["____/subscribe", (socket) => { everyone.add(socket); return "Subscription: OK"; }],
  ["____/echo", (socket, payload) => `Received: ${payload}`],
  ["____/shout", (socket, payload) => {
    const data = Buffer.from(payload);
    for (const client of everyone) client.send(data, { binary: false });
  }],
]);

const server = new WebSocketServer({
  host: "127.0.0.1", port: Number(port), perMessageDeflate: false, maxPayload: 16 << 20, backlog: 1024,
});
server.on("connection", (socket) => {
  socket.on("close", () => everyone.delete(socket));
  if (mode === "raw") {
    socket.on("message", (data) => socket.send(data, { binary: false }));
    return;
  }
  socket.on("message", (data) => {
    const { channel, message, payload } = JSON.parse(data);
    const reply = handlers.get(`${channel}/${message}`)(socket, payload);
    if (reply !== undefined) socket.send(reply);
  });
});
