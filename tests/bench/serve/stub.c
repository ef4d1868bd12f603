/* stub.c: an engine that computes nothing, for benchmarks of what stands before it. One thread, epoll, HTTP/1.1.

   stub PORT CHUNKS GAP_US     listens on 127.0.0.1:PORT until it is killed

   A POST whose body says "stream":true is answered by CHUNKS SSE events and [DONE], the headers and every event in a
   write of their own, as uvicorn does it; the first event follows the headers at once, the others GAP_US apart (0: all
   at once). Every other POST gets a short completion. GETs get what routers want to see of a healthy engine. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { MOST_CONNECTIONS = 20000 };

typedef struct {
  int fd, streaming, left;
  int64_t due_us;
  size_t size, room, wanted; /* wanted: bytes of the request at the buffer's start, 0 while its headers are incomplete */
  int chunked;
  char *data;
} Connection;

static Connection *connections[MOST_CONNECTIONS];
static int chunks, streams;
static int64_t gap_us;

static int64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static void put(Connection *c, const char *text, size_t size) {
  while (size) { /* answers are far smaller than a socket's buffer; a reader that stops reading loses its connection */
    ssize_t n = send(c->fd, text, size, MSG_NOSIGNAL);
    if (n <= 0) return;
    text += n, size -= n;
  }
}

static void put_json(Connection *c, const char *json) {
  char text[2048];
  int n = snprintf(text, sizeof text,
                   "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", strlen(json),
                   json);
  put(c, text, n);
}

static void put_event(Connection *c, const char *event) {
  char text[1024];
  size_t size = strlen(event) + 2;
  int n = snprintf(text, sizeof text, "%zx\r\n%s\n\n\r\n", size, event);
  put(c, text, n);
}

static void next_event(Connection *c) {
  if (c->left-- > 0) {
    put_event(c, "data: {\"id\":\"chatcmpl-123\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":"
                 "\"tiny\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"logprobs\":null,"
                 "\"finish_reason\":null}]}");
    return;
  }
  put_event(c, "data: [DONE]");
  put(c, "0\r\n\r\n", 5);
  c->streaming = 0, streams--;
}

static void answer(Connection *c, size_t head) {
  char *body = c->data + head;
  size_t size = c->wanted - head;
  if (memcmp(c->data, "GET", 3) == 0) {
    put_json(c, "{\"status\":\"ok\",\"model_path\":\"tiny\",\"served_model_name\":\"tiny\",\"tokenizer_path\":\"tiny\","
                "\"dp_size\":1,\"tp_size\":1,\"is_generation\":true,\"object\":\"list\",\"data\":[{\"id\":\"tiny\","
                "\"object\":\"model\",\"created\":1700000000,\"owned_by\":\"stub\"}],\"version\":\"0.5.23\"}");
  } else if (memmem(body, size, "\"stream\":true", 13) || memmem(body, size, "\"stream\": true", 14)) {
    static const char start[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                                "cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n";
    put(c, start, sizeof start - 1);
    c->streaming = 1, streams++;
    c->left = chunks;
    next_event(c);
    c->due_us = now_us() + gap_us;
    while (gap_us == 0 && c->streaming) next_event(c);
  } else {
    put_json(c, "{\"id\":\"chatcmpl-123\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"tiny\","
                "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"Hello there, how may I "
                "assist you today?\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":9,"
                "\"completion_tokens\":12,\"total_tokens\":21}}");
  }
}

static void drop(Connection *c) {
  if (c->streaming) streams--;
  connections[c->fd] = NULL;
  close(c->fd);
  free(c->data);
  free(c);
}

/* Answers every request that stands complete in the buffer. */
static void consume(Connection *c) {
  while (!c->streaming && c->size) {
    char *end = memmem(c->data, c->size, "\r\n\r\n", 4);
    if (!end) return;
    size_t head = end + 4 - c->data;
    if (!c->wanted) {
      c->chunked = 0, c->wanted = head;
      for (char *line = c->data; line < end; line = (char *)memmem(line, end + 2 - line, "\r\n", 2) + 2) {
        if (strncasecmp(line, "content-length:", 15) == 0) c->wanted = head + strtoul(line + 15, NULL, 10);
        if (strncasecmp(line, "transfer-encoding: chunked", 26) == 0) c->chunked = 1;
        if (strncasecmp(line, "expect: 100", 11) == 0) put(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
      }
    }
    if (c->chunked) { /* bodies here are JSON, which cannot contain the mark of the last chunk */
      char *last = memmem(c->data + head, c->size - head, "0\r\n\r\n", 5);
      if (!last) return;
      c->wanted = last + 5 - c->data;
    }
    if (c->size < c->wanted) return;
    answer(c, head);
    memmove(c->data, c->data + c->wanted, c->size - c->wanted);
    c->size -= c->wanted, c->wanted = 0;
  }
}

int main(int argc, char **argv) {
  if (argc != 4) return fprintf(stderr, "usage: stub PORT CHUNKS GAP_US\n"), 2;
  signal(SIGPIPE, SIG_IGN);
  chunks = atoi(argv[2]), gap_us = atoll(argv[3]);
  int yes = 1, listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) return perror("stub"), 1;
  epoll_ctl(poll, EPOLL_CTL_ADD, listener, &(struct epoll_event){.events = EPOLLIN, .data.fd = listener});
  for (;;) {
    struct epoll_event events[256];
    struct timespec nap = {.tv_nsec = 200000}; /* a stream's next event is up to 0.2 ms late */
    int n = epoll_pwait2(poll, events, 256, streams ? &nap : NULL, NULL);
    for (int i = 0; i < n; i++) {
      int fd = events[i].data.fd;
      if (fd == listener) {
        int peer = accept(listener, NULL, NULL);
        if (peer < 0) continue;
        if (peer >= MOST_CONNECTIONS) { close(peer); continue; }
        setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        connections[peer] = calloc(1, sizeof(Connection));
        connections[peer]->fd = peer;
        epoll_ctl(poll, EPOLL_CTL_ADD, peer, &(struct epoll_event){.events = EPOLLIN, .data.fd = peer});
        continue;
      }
      Connection *c = connections[fd];
      if (c->room - c->size < 65536) c->data = realloc(c->data, c->room += 131072);
      ssize_t got = recv(fd, c->data + c->size, c->room - c->size, MSG_DONTWAIT);
      if (got == 0 || (got < 0 && errno != EAGAIN)) { drop(c); continue; }
      if (got > 0) c->size += got, consume(c);
    }
    if (!streams) continue;
    int64_t now = now_us();
    for (int fd = 0, seen = 0, all = streams; fd < MOST_CONNECTIONS && seen < all; fd++) {
      Connection *c = connections[fd];
      if (!c || !c->streaming) continue;
      seen++;
      if (c->due_us > now) continue;
      c->due_us += gap_us;
      next_event(c);
      if (!c->streaming) consume(c);
    }
  }
}
