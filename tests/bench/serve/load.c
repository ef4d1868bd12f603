/* load.c: HTTP/1.1 load on reused connections, one thread, epoll; prints one JSON object.

   load PORT CONNECTIONS SECONDS BODY_BYTES STREAM(0|1) RATE

   Every connection sends a chat completion of BODY_BYTES, reads the whole answer, sends the next: at once where RATE is
   0, else when its turn comes, RATE requests a second in all. Of each answer it checks status and framing, and counts
   the SSE events. Times in microseconds: total_us to the answer's last byte, first_us to the first byte of its body,
   both from the moment at which the request was due (so that a stall is not forgiven). The first tenth of the time
   warms up and is not counted. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

typedef struct {
  int fd, status, chunked, in_body, waiting;
  int64_t sent_us, first_us;
  size_t sent, size, read, left; /* read: bytes looked at; left: bytes of body or chunk still to come */
  long events;
  char data[65536 * 4];
} Connection;

typedef struct { long count; size_t room; int64_t *values; } Times;

static char *request;
static size_t request_size;
static Times total, first;
static long events_seen, errors, fewest = 1 << 30, most;
static struct sockaddr_in at = {.sin_family = AF_INET};
static int poll_fd;
static int64_t period_us; /* between two requests of one connection; 0: none */

static int64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static void note(Times *times, int64_t value) {
  if ((size_t)times->count == times->room)
    times->values = realloc(times->values, (times->room = times->room * 2 + 1024) * sizeof(int64_t));
  times->values[times->count++] = value;
}

static int ascending(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

static void show(const char *name, Times *times) {
  qsort(times->values, times->count, sizeof(int64_t), ascending);
  double shares[] = {0.05, 0.25, 0.5, 0.75, 0.9, 0.99};
  printf("\"%s\": {", name);
  for (int i = 0; i < 6; i++)
    printf("%s\"p%g\": %lld", i ? ", " : "", shares[i] * 100,
           times->count ? (long long)times->values[(long)(shares[i] * (times->count - 1))] : -1);
  printf("}");
}

/* The next request on `c`: sent now, or awaiting its turn. */
static void begin(Connection *c) {
  c->status = c->chunked = c->in_body = c->waiting = 0;
  c->size = c->read = c->left = c->sent = c->events = 0;
  c->first_us = 0, c->waiting = period_us > 0;
  c->sent_us = c->waiting ? c->sent_us + period_us : now_us();
}

static void push(Connection *c) {
  if (c->waiting) return;
  while (c->sent < request_size) {
    ssize_t n = send(c->fd, request + c->sent, request_size - c->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n <= 0) break;
    c->sent += n;
  }
  uint32_t want = EPOLLIN | (c->sent < request_size ? EPOLLOUT : 0);
  epoll_ctl(poll_fd, EPOLL_CTL_MOD, c->fd, &(struct epoll_event){.events = want, .data.ptr = c});
}

static void open_connection(Connection *c) {
  int yes = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(c->fd, (struct sockaddr *)&at, sizeof at)) { perror("load: connect"); exit(1); }
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &(struct epoll_event){.events = EPOLLIN, .data.ptr = c});
}

/* Takes in what has arrived. Returns 1 when the answer is complete, -1 when it is not HTTP. */
static int parse(Connection *c) {
  if (!c->in_body) {
    char *end = memmem(c->data, c->size, "\r\n\r\n", 4);
    if (!end) return 0;
    if (sscanf(c->data, "HTTP/1.1 %d", &c->status) != 1) return -1;
    for (char *line = c->data; line < end; line = (char *)memmem(line, end + 2 - line, "\r\n", 2) + 2) {
      if (strncasecmp(line, "content-length:", 15) == 0) c->left = strtoul(line + 15, NULL, 10);
      if (strncasecmp(line, "transfer-encoding: chunked", 26) == 0) c->chunked = 1;
    }
    c->in_body = 1, c->read = end + 4 - c->data;
    if (c->status == 100) return -1;
  }
  if (c->size > c->read && !c->first_us) c->first_us = now_us();
  while (c->read < c->size) {
    if (c->chunked && !c->left) { /* "SIZE\r\n", and the data's own \r\n counted with it */
      char *line = c->data + c->read, *end = memmem(line, c->size - c->read, "\r\n", 2);
      if (!end) return 0;
      char *after;
      size_t size = strtoul(line, &after, 16);
      if (after == line) return -1;
      if (!size) {
        if (c->size - c->read < (size_t)(end - line) + 4) return 0;
        return 1;
      }
      c->read += end + 2 - line, c->left = size + 2;
      continue;
    }
    size_t n = c->size - c->read < c->left ? c->size - c->read : c->left;
    if (!n) break;
    c->read += n, c->left -= n;
  }
  return !c->chunked && !c->left;
}

static void count_events(Connection *c) { /* events never span what a router may cut, as the whole answer is kept */
  for (char *p = c->data; (p = memmem(p, c->data + c->size - p, "data: ", 6)); p += 6) c->events++;
}

int main(int argc, char **argv) {
  if (argc != 7) return fprintf(stderr, "usage: load PORT CONNECTIONS SECONDS BODY_BYTES STREAM RATE\n"), 2;
  int n = atoi(argv[2]), stream = atoi(argv[5]);
  double seconds = atof(argv[3]);
  if (atof(argv[6]) > 0) period_us = 1e6 * n / atof(argv[6]);
  static const char head[] = "{\"model\":\"tiny\",\"max_tokens\":32,\"stream\":%s,\"messages\":[{\"role\":\"user\",\"content\":\"";
  static const char tail[] = "\"}]}";
  char start[512], headers[512];
  int start_size = snprintf(start, sizeof start, head, stream ? "true" : "false");
  long words = atol(argv[4]) - start_size - (long)strlen(tail);
  if (words < 1) words = 1;
  size_t body = start_size + words + strlen(tail);
  int head_size = snprintf(headers, sizeof headers,
                           "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nUser-Agent: load\r\nAccept: */*\r\n"
                           "Authorization: Bearer none\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n",
                           argv[1], body);
  request_size = head_size + body;
  char *to = request = malloc(request_size);
  memcpy(to, headers, head_size), to += head_size;
  memcpy(to, start, start_size), to += start_size;
  for (long i = 0; i < words; i++) *to++ = "lorem ipsum dolor sit amet "[i % 27];
  memcpy(to, tail, strlen(tail));

  at.sin_port = htons(atoi(argv[1])), at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  poll_fd = epoll_create1(0);
  Connection *connections = calloc(n, sizeof(Connection));
  for (int i = 0; i < n; i++) open_connection(&connections[i]);
  int64_t began = now_us(), counted = began + seconds * 100000, end = began + seconds * 1000000;
  for (int i = 0; i < n; i++) { /* with a rate, the connections take turns */
    connections[i].sent_us = began - period_us + period_us * i / n;
    begin(&connections[i]), push(&connections[i]);
  }
  for (int64_t now = began; now < end;) {
    struct epoll_event ready[256];
    int64_t next = now + 100000;
    for (int i = 0; i < n && period_us; i++) {
      Connection *c = &connections[i];
      if (c->waiting && c->sent_us <= now) c->waiting = 0, push(c);
      if (c->waiting && c->sent_us < next) next = c->sent_us;
    }
    struct timespec nap = {.tv_nsec = (next > now ? next - now : 0) * 1000};
    int count = epoll_pwait2(poll_fd, ready, 256, &nap, NULL);
    for (int i = 0; i < count; i++) {
      Connection *c = ready[i].data.ptr;
      if (c->sent < request_size && ready[i].events & EPOLLOUT) push(c);
      if (!(ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) continue;
      ssize_t got = recv(c->fd, c->data + c->size, sizeof c->data - c->size, MSG_DONTWAIT);
      int state = got > 0 ? (c->size += got, parse(c)) : -1;
      if (state == 0) continue;
      now = now_us();
      count_events(c);
      if (state < 0 || c->status != 200) errors++;
      else if (now >= counted) {
        note(&total, now - c->sent_us), note(&first, c->first_us - c->sent_us);
        events_seen += c->events;
        if (c->events < fewest) fewest = c->events;
        if (c->events > most) most = c->events;
      }
      if (state < 0) close(c->fd), open_connection(c);
      begin(c), push(c);
    }
    now = now_us();
  }
  printf("{\"requests\": %ld, \"errors\": %ld, \"seconds\": %.4f, \"events\": %ld, \"fewest_events\": %ld, "
         "\"most_events\": %ld, ",
         total.count, errors, (end - counted) / 1e6, events_seen, total.count ? fewest : 0, most);
  show("total_us", &total), printf(", "), show("first_us", &first), printf("}\n");
  return 0;
}
