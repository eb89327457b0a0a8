/* A network switch between namespaces, with rate, delay, loss, links that go down, and a time per frame.
 *
 *     switch NAMESPACE...         makes eth0 in each, prints "ready", then reads commands from its standard input:
 *
 *     rate BITS_PER_SECOND        of every link, each way; 0: unlimited
 *     delay SECONDS               one way
 *     queue BYTES                 size of a link's queue; frames that do not fit are dropped
 *     frame SECONDS               time of each frame on its sender's link, besides its bits; bare ACKs take none
 *     loss NODE PROBABILITY       probability that a frame to that node is lost
 *     link NODE 0|1               takes the node's link down, or up
 *     stats                       prints {"frames", "dropped", "lost"}; the other commands print "ok"
 *
 * Each eth0 is a TUN device whose other end this process holds. Frames may have 64 KB, since the kernel leaves
 * segmentation to the network card. A frame waits for its sender's link, is delayed, and waits for its receiver's
 * link. The switch ends when its input ends, and its devices with it. Nodes have the addresses x.x.x.1, x.x.x.2, ...
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <math.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define NODES 64
#define VNET 10 /* bytes of virtio header before each frame */
#define BARE 60 /* frames up to this size have no data: an acknowledgement has 52 bytes */

typedef struct {
  double time;
  unsigned long number; /* order of frames that are due at the same time */
  int arrives, to, length;
  unsigned char *data;
} Event;

static Event *heap;
static size_t events, room;
static unsigned long number;

static int before(const Event *a, const Event *b) {
  return a->time < b->time || (a->time == b->time && a->number < b->number);
}

static void swap(size_t i, size_t j) {
  Event event = heap[i];
  heap[i] = heap[j];
  heap[j] = event;
}

static void push(Event event) {
  event.number = ++number;
  if (events == room) heap = realloc(heap, (room = room ? 2 * room : 1024) * sizeof *heap);
  if (!heap) abort();
  heap[events] = event;
  for (size_t i = events++; i && before(&heap[i], &heap[(i - 1) / 2]); i = (i - 1) / 2) swap(i, (i - 1) / 2);
}

static Event pop(void) {
  Event first = heap[0];
  heap[0] = heap[--events];
  for (size_t i = 0;;) {
    size_t left = 2 * i + 1, least = i;
    if (left < events && before(&heap[left], &heap[least])) least = left;
    if (left + 1 < events && before(&heap[left + 1], &heap[least])) least = left + 1;
    if (least == i) return first;
    swap(i, least);
    i = least;
  }
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static int nodes, device[NODES], up[NODES];
static double sending[NODES], receiving[NODES], loss[NODES]; /* busy until; probability */
static double rate, delay, queue = 4 << 20, cost;
static unsigned long frames, dropped, lost;

static int plug(const char *namespace) {
  char path[256];
  snprintf(path, sizeof path, "/run/netns/%s", namespace);
  int ns = open(path, O_RDONLY), fd;
  struct ifreq request = {.ifr_name = "eth0", .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
  if (ns < 0 || setns(ns, CLONE_NEWNET)) return perror(path), -1;
  close(ns);
  if ((fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK)) < 0) return perror("/dev/net/tun"), -1;
  if (ioctl(fd, TUNSETIFF, &request)) return perror("TUNSETIFF"), -1;
  ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
  return fd;
}

static void obey(const char *line) {
  int node;
  double value;
  if (!strcmp(line, "stats")) {
    printf("{\"frames\": %lu, \"dropped\": %lu, \"lost\": %lu}\n", frames, dropped, lost);
  } else {
    if (sscanf(line, "rate %lf", &value) == 1) rate = value;
    else if (sscanf(line, "delay %lf", &value) == 1) delay = value;
    else if (sscanf(line, "queue %lf", &value) == 1) queue = value;
    else if (sscanf(line, "frame %lf", &value) == 1) cost = value;
    else if (sscanf(line, "loss %d %lf", &node, &value) == 2 && node >= 0 && node < nodes) loss[node] = value;
    else if (sscanf(line, "link %d %lf", &node, &value) == 2 && node >= 0 && node < nodes) up[node] = value != 0;
    printf("ok\n");
  }
  fflush(stdout);
}

/* What has travelled: into the receiver's link, or out of it into its device. */
static void deliver(double time) {
  while (events && heap[0].time <= time) {
    Event event = pop();
    int to = event.to;
    double per_byte = rate > 0 ? 8 / rate : 0;
    if (event.arrives) {
      if (up[to] && write(device[to], event.data, event.length) < 0) dropped++;
      free(event.data);
    } else if (receiving[to] - event.time > queue * per_byte && per_byte > 0) {
      dropped++;
      free(event.data);
    } else {
      event.time = receiving[to] = fmax(event.time, receiving[to] + (event.length - VNET) * per_byte);
      event.arrives = 1;
      push(event);
    }
  }
}

/* What a node sends: through its link, onto the way. */
static void take(int from) {
  static unsigned char buffer[70000];
  double time = now(), per_byte = rate > 0 ? 8 / rate : 0;
  for (int turn = 0; turn < 8; turn++) {
    int length = read(device[from], buffer, sizeof buffer), size = length - VNET;
    if (length < 0) return;
    int to = length < 30 || buffer[VNET] >> 4 != 4 ? -1 : buffer[29] - 1; /* IPv4 alone, by the address's last byte */
    if (to < 0 || to >= nodes || !up[from]) continue;
    frames++;
    if (loss[to] > 0 && drand48() < loss[to]) {
      lost++;
    } else if (sending[from] - time > queue * per_byte && per_byte > 0) {
      dropped++;
    } else {
      unsigned char *data = malloc(length);
      if (!data) abort();
      memcpy(data, buffer, length);
      sending[from] = fmax(time, sending[from]) + size * per_byte + (size > BARE ? cost : 0);
      push((Event){.time = sending[from] + delay, .to = to, .length = length, .data = data});
    }
  }
}

int main(int count, char **names) {
  struct pollfd polled[NODES + 1];
  struct sched_param priority = {1};
  if ((nodes = count - 1) < 1 || nodes > NODES) return fprintf(stderr, "switch: 1 to %d namespaces\n", NODES), 2;
  for (int i = 0; i < nodes; i++) {
    if ((device[i] = plug(names[i + 1])) < 0) return 1;
    polled[i] = (struct pollfd){.fd = device[i], .events = POLLIN};
    up[i] = 1;
  }
  polled[nodes] = (struct pollfd){.fd = 0, .events = POLLIN};
  prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
  sched_setscheduler(0, SCHED_RR, &priority); /* ahead of the ranks; where that is refused, delays are less exact */
  printf("ready\n");
  fflush(stdout);
  for (;;) {
    deliver(now());
    double wait = events ? fmax(0, fmin(1, heap[0].time - now())) : 1;
    struct timespec timeout = {(time_t)wait, (long)((wait - (time_t)wait) * 1e9)};
    if (ppoll(polled, nodes + 1, &timeout, 0) < 0) continue;
    if (polled[nodes].revents) {
      char line[256];
      int length = 0;
      while (length < 255 && read(0, line + length, 1) == 1 && line[length] != '\n') length++;
      if (!length) return 0;
      line[length] = 0;
      obey(line);
    }
    for (int i = 0; i < nodes; i++)
      if (polled[i].revents & POLLIN) take(i);
  }
}
