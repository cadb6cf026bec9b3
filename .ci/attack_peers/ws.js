// The same on node's `ws`: `node ws.js PORT`; see servers.py.
const http = require("http");
const { WebSocketServer } = require("ws");

const limit = 1 << 20;
const server = http.createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    try {
      const kind = request.headers["content-type"] || "";
      if (kind.includes("json")) JSON.parse(Buffer.concat(parts));
    } catch {
      response.statusCode = 400;
    }
    response.setHeader("Content-Type", "text/html");
    response.end("<h1>Hello</h1>");
  });
});

function dispatch(text) {
  try {
    const { message, payload } = JSON.parse(text);
    return JSON.stringify(message === "echo" ? payload : "not found");
  } catch (error) {
    return `error: ${error.name}`;
  }
}

const sockets = new WebSocketServer({ server, perMessageDeflate: true, maxPayload: limit });
sockets.on("connection", (socket) => {
  socket.on("error", () => {});
  socket.on("message", (data) => socket.send(dispatch(data)));
});
server.listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: 1024 });
