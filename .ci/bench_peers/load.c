/* What load.py does again and again, so that the generator is not the limit.

   load.py opens the connections and compares the first replies; what is here sends, receives, and
   compares the bytes of all others. It polls without sleeping: to sleep would make the server pay
   for waking us. All functions return a count, or less than 0 for what went wrong.

   Of the 4.5 microseconds for an echo on one of 100 connections, 3.7 are the kernel's to send, and
   0.6 to receive. With 1.5 more for each reply the servers were as fast: it is not the limit. */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CLOSED = -1, WRONG = -2, FAILED = -3, EVENTS = 1024, BUFFER = 1 << 20 };

struct job {
    const char *request, *reply;
    long request_size, reply_size;
    long unchecked;  /* bytes at the beginning of a reply that may differ: a date */
    long count;      /* fanout: replies to one request; churn: connections at a time */
    double until;    /* on the clock of time.perf_counter(), in seconds */
    double busy;     /* is counted: seconds, without those of polls that found nothing */
    double since;    /* when what is being handled was found */
};

static char buffer[BUFFER];
static struct epoll_event events[EVENTS];

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static int ready(int poll, struct job *job)
{
    double time = now();
    if (job->since)
        job->busy += time - job->since;
    for (;;) {
        int found = epoll_wait(poll, events, EVENTS, 0);
        job->since = time;
        if (found)
            return found < 0 ? FAILED : found;
        time = now();
        if (time > job->until + 20)
            return errno = ETIMEDOUT, FAILED;
    }
}

static int send_all(int fd, const char *data, long size)
{
    for (long sent; size > 0; data += sent, size -= sent)
        if ((sent = send(fd, data, size, MSG_NOSIGNAL)) < 0)
            return FAILED;
    return 0;
}

/* Receive, and compare. Returns how many replies are complete with it. */
static long take(int fd, long *at, const struct job *job)
{
    long size = recv(fd, buffer, BUFFER, 0), replies = 0;
    if (size <= 0)
        return size ? FAILED : CLOSED;
    for (char *data = buffer; size;) {
        long piece = job->reply_size - *at < size ? job->reply_size - *at : size;
        long skip = job->unchecked > *at ? job->unchecked - *at : 0;
        if (piece > skip && memcmp(data + skip, job->reply + *at + skip, piece - skip))
            return WRONG;
        data += piece, size -= piece, *at += piece;
        if (*at == job->reply_size)
            *at = 0, replies++;
    }
    return replies;
}

/* What has come at all connections; `asking`: a request for each reply. `at` has the bytes received
   of an unfinished reply, by descriptor. */
static long collect(int poll, long *at, struct job *job, int asking)
{
    long total = 0;
    int found = ready(poll, job);
    if (found < 0)
        return found;
    for (int each = 0; each < found; each++) {
        int fd = events[each].data.fd;
        long replies = take(fd, &at[fd], job);
        if (replies < 0)
            return replies;
        if (asking && send_all(fd, job->request, replies * job->request_size))
            return FAILED;
        total += replies;
    }
    return total;
}

/* A request for each reply. */
long pump(int poll, long *at, struct job *job)
{
    long total = 0;
    while (now() < job->until) {
        long replies = collect(poll, at, job, 1);
        if (replies < 0)
            return replies;
        total += replies;
    }
    return total;
}

/* One request, and `count` replies at all connections together; then the next. */
long fanout(int poll, long *at, struct job *job, int first)
{
    long total = 0;
    while (now() < job->until) {
        if (send_all(first, job->request, job->request_size))
            return FAILED;
        for (long missing = job->count; missing > 0;) {
            long replies = collect(poll, at, job, 0);
            if (replies < 0)
                return replies;
            missing -= replies, total += replies;
        }
    }
    return total;
}

static int dial(int poll, long *at, const struct job *job, int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event event = {.events = EPOLLIN};
    int one = 1, fd = event.data.fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one)
        || connect(fd, (struct sockaddr *)&address, sizeof address)
        || epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event))
        return FAILED;
    at[fd] = -1;
    return send_all(fd, job->request, job->request_size);
}

/* Connect, upgrade, closing handshake (`reply` is our Close frame), end of the stream, and again.
   `at` is -1 before the answer, then how much of the end of its head was seen, then 5. */
long churn(int poll, long *at, struct job *job, int port)
{
    long total = 0;
    for (; job->count; job->count--)  /* the first time */
        if (dial(poll, at, job, port))
            return FAILED;
    while (now() < job->until) {
        int found = ready(poll, job);
        if (found < 0)
            return found;
        for (int each = 0; each < found; each++) {
            int fd = events[each].data.fd;
            long size = recv(fd, buffer, BUFFER, 0);
            if (size < 0)
                return FAILED;
            if (size == 0) {
                if (at[fd] < 5)
                    return CLOSED;
                close(fd), total++;
                if (dial(poll, at, job, port))
                    return FAILED;
            } else if (at[fd] == 4) {
                if ((unsigned char)buffer[0] != 0x88)
                    return WRONG;
                at[fd] = 5;
            } else if (at[fd] < 4) {
                if (at[fd] < 0 && (size < 12 || memcmp(buffer + 8, " 101", 4)))
                    return WRONG;
                at[fd] = at[fd] < 0 ? 0 : at[fd];
                for (char *byte = buffer; byte < buffer + size; byte++)
                    at[fd] = *byte == "\r\n\r\n"[at[fd]] ? at[fd] + 1 : *byte == '\r';
                if (at[fd] == 4 && send_all(fd, job->reply, job->reply_size))
                    return FAILED;
            }
        }
    }
    return total;
}
