/* Loaded into the processes of a node (LD_PRELOAD): tells the fault harness of each step before it is taken, and after.

Steps are: a file renamed below AITBC_FAULT_ROOT, the start of a program whose directory is below it, the reaping of
a child; with AITBC_FAULT_DISK also a temporary file made there and an fsync there. For each, a connection to the
socket AITBC_FAULT_SOCKET:

    ours:  OPERATION \t PID \t FIRST \t SECOND \n         the answer: 0, or the errno to fail with, and \n
    ours:  RESULT \n  after the real call                 the answer: 0 \n

While the harness does not answer, the process stands at that very step, and may be killed there. Without a harness
that listens, everything goes on as if this were not there. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

/* Longer than the harness ever holds a process: one that has forgotten us must not hold it for ever. */
#define PATIENCE_S 60

static char root[PATH_MAX], socket_path[PATH_MAX];
static int with_disk;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void read_environment(void) {
    const char *where = getenv("AITBC_FAULT_ROOT"), *harness = getenv("AITBC_FAULT_SOCKET");
    snprintf(root, sizeof root, "%s", where ? where : "");
    snprintf(socket_path, sizeof socket_path, "%s", harness ? harness : "");
    with_disk = getenv("AITBC_FAULT_DISK") != NULL;
}

static int below_root(const char *path) {
    size_t length = strlen(root);
    return length && strncmp(path, root, length) == 0 && path[length] == '/';
}

/* Gives the absolute path of a name below a directory's descriptor; 0 when it cannot be told. */
static int absolute(int at, const char *name, char *path) {
    char link[64], where[PATH_MAX];
    if (name[0] == '/') {
        return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
    }
    if (at == AT_FDCWD) {
        if (!getcwd(where, sizeof where)) {
            return 0;
        }
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, where, sizeof where - 1);
        if (length < 0) {
            return 0;
        }
        where[length] = 0;
    }
    return snprintf(path, PATH_MAX, name[0] ? "%s/%s" : "%s", where, name) < PATH_MAX;
}

/* Reads one number and a line break; 0 as well when the harness has gone. */
static int answer(int fd) {
    char text[16];
    size_t length = 0;
    while (length < sizeof text - 1) {
        ssize_t got = recv(fd, text + length, 1, 0);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0 || text[length] == '\n') {
            break;
        }
        length++;
    }
    text[length] = 0;
    return atoi(text);
}

/* Asks whether the step may be taken: 0, or the errno to fail with. `*fd` is for `done`, -1 if nobody listens. */
static int ask(int *fd, const char *operation, const char *first, const char *second) {
    struct sockaddr_un harness = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = PATIENCE_S};
    char text[2 * PATH_MAX + 64];
    int saved = errno;
    *fd = -1;
    if (!socket_path[0] || strlen(socket_path) >= sizeof harness.sun_path) {
        return 0;
    }
    strcpy(harness.sun_path, socket_path);
    int length = snprintf(text, sizeof text, "%s\t%d\t%s\t%s\n", operation, (int)getpid(), first, second);
    *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*fd < 0) {
        errno = saved;
        return 0;
    }
    setsockopt(*fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(*fd, (struct sockaddr *)&harness, sizeof harness) < 0 ||
        send(*fd, text, (size_t)length, MSG_NOSIGNAL) != length) {
        close(*fd);
        *fd = -1;
        errno = saved;
        return 0;
    }
    int verdict = answer(*fd);
    if (verdict) {
        close(*fd);
        *fd = -1;
    }
    errno = saved;
    return verdict;
}

/* Tells how the call went, and waits until the harness lets the process go on. */
static void done(int fd, int result) {
    char text[32];
    int saved = errno;
    if (fd < 0) {
        return;
    }
    int length = snprintf(text, sizeof text, "%d\n", result);
    if (send(fd, text, (size_t)length, MSG_NOSIGNAL) == length) {
        answer(fd);
    }
    close(fd);
    errno = saved;
}

static int refused(int number) {
    errno = number;
    return -1;
}

/* Asks for a step between two names. */
static int ask_names(int *fd, int old_at, const char *old, int new_at, const char *new) {
    char first[PATH_MAX], second[PATH_MAX];
    *fd = -1;
    int told = absolute(old_at, old, first) && absolute(new_at, new, second) && below_root(second);
    return told ? ask(fd, "rename", first, second) : 0;
}

int rename(const char *old, const char *new) {
    int fd, number = ask_names(&fd, AT_FDCWD, old, AT_FDCWD, new);
    if (number) {
        return refused(number);
    }
    int result = REAL(rename)(old, new);
    done(fd, result);
    return result;
}

int renameat(int old_at, const char *old, int new_at, const char *new) {
    int fd, number = ask_names(&fd, old_at, old, new_at, new);
    if (number) {
        return refused(number);
    }
    int result = REAL(renameat)(old_at, old, new_at, new);
    done(fd, result);
    return result;
}

int execve(const char *path, char *const argv[], char *const envp[]) {
    char where[PATH_MAX];
    int fd = -1, number = 0;
    if (getcwd(where, sizeof where) && below_root(where)) {
        number = ask(&fd, "execve", where, path);
    }
    if (number) {
        return refused(number);
    }
    int result = REAL(execve)(path, argv, envp);
    done(fd, result);
    return result;
}

pid_t wait4(pid_t pid, int *status, int options, struct rusage *used) {
    char child[32];
    int fd;
    snprintf(child, sizeof child, "%d", (int)pid);
    ask(&fd, "wait4", child, "");
    pid_t result = REAL(wait4)(pid, status, options, used);
    done(fd, result);
    return result;
}

/* The disk: not asked of unless it is to fail. */

int fsync(int file) {
    char path[PATH_MAX];
    int fd = -1, number = 0;
    if (with_disk && absolute(file, "", path) && below_root(path)) {
        number = ask(&fd, "fsync", path, "");
    }
    if (number) {
        return refused(number);
    }
    int result = REAL(fsync)(file);
    done(fd, result);
    return result;
}

static int ask_making(int *fd, int at, const char *path, int flags) {
    char full[PATH_MAX];
    *fd = -1;
    int told = with_disk && (flags & O_CREAT) && absolute(at, path, full) && below_root(full);
    return told ? ask(fd, "create", full, "") : 0;
}

static mode_t mode_of(int flags, va_list more) {
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = mode_of(flags, more);                                                                            \
        va_end(more);                                                                                                  \
        int fd, number = ask_making(&fd, AT_FDCWD, path, flags);                                                       \
        if (number) {                                                                                                  \
            return refused(number);                                                                                    \
        }                                                                                                              \
        int result = REAL(name)(path, flags, mode);                                                                    \
        done(fd, result);                                                                                              \
        return result;                                                                                                 \
    }

#define OPENAT(name)                                                                                                   \
    int name(int at, const char *path, int flags, ...) {                                                               \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = mode_of(flags, more);                                                                            \
        va_end(more);                                                                                                  \
        int fd, number = ask_making(&fd, at, path, flags);                                                             \
        if (number) {                                                                                                  \
            return refused(number);                                                                                    \
        }                                                                                                              \
        int result = REAL(name)(at, path, flags, mode);                                                                \
        done(fd, result);                                                                                              \
        return result;                                                                                                 \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
