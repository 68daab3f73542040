/* Makes changes of the files below a folder fail, or end the process; preloaded by tests/soak/faults.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static volatile long fails_from = -1, fails_until; /* numbers of the changes that fail, counted from 0; -1: none */
static volatile int code;             /* errno of those that fail; 0: the process is killed */
static atomic_long changes;
static char last[64];

/* `times` changes below `folder`, from number `from` on, fail with `error`, or end the process for error 0. */
void faults_arm(const char *folder, long from, long times, int error) {
  changes = 0;
  code = error;
  fails_from = from;
  fails_until = from + times;
  last[0] = 0;
  strncpy(root, folder, sizeof root - 1);
}

/* Nothing fails any more; returns how many changes there were. */
long faults_disarm(void) {
  root[0] = 0;
  return changes;
}

const char *faults_last(void) { return last; }

/* Whether a change must fail, with errno set. A full disk does not keep files from being removed or renamed. */
static int fails(const char *path, const char *name, int allocates) {
  size_t length = strlen(root);
  if (!length || !path || strncmp(path, root, length)) return 0;
  long number = atomic_fetch_add(&changes, 1);
  if (fails_from < 0 || number < fails_from || number >= fails_until) return 0;
  if ((code == ENOSPC || code == EDQUOT) && !allocates) return 0;
  if (!last[0]) strncpy(last, name, sizeof last - 1);
  if (!code) kill(getpid(), SIGKILL);
  errno = code;
  return 1;
}

static const char *absolute(int folder, const char *path, char *buffer) {
  char link[64];
  if (!root[0] || !path || path[0] == '/') return path;
  ssize_t size;
  if (folder == AT_FDCWD) {
    if (!getcwd(buffer, PATH_MAX)) return path;
    size = strlen(buffer);
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    if ((size = readlink(link, buffer, PATH_MAX - 1)) < 0) return path;
  }
  snprintf(buffer + size, PATH_MAX - size, "/%s", path);
  return buffer;
}

static int fails_at(int folder, const char *path, const char *name, int allocates) {
  char buffer[PATH_MAX];
  return root[0] && fails(absolute(folder, path, buffer), name, allocates);
}

static int fails_open(int fd, const char *name, int allocates) {
  char link[64], path[PATH_MAX];
  if (!root[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(path, name, allocates);
}

#define ORIGINAL(name) \
  static __typeof__(&name) original; \
  if (!original) original = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define ON_FILE(type, name, allocates, parameters, arguments) \
  type name parameters { \
    ORIGINAL(name); \
    return fails_open(fd, #name, allocates) ? -1 : original arguments; \
  }

#define ON_PATH(name, allocates, folder, parameters, arguments) \
  int name parameters { \
    ORIGINAL(name); \
    return fails_at(folder, path, #name, allocates) ? -1 : original arguments; \
  }

ON_FILE(ssize_t, write, 1, (int fd, const void *data, size_t size), (fd, data, size))
ON_FILE(ssize_t, writev, 1, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_FILE(ssize_t, pwrite, 1, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_FILE(ssize_t, pwrite64, 1, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_FILE(ssize_t, pwritev, 1, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
ON_FILE(int, fsync, 0, (int fd), (fd))
ON_FILE(int, fdatasync, 0, (int fd), (fd))
ON_FILE(int, ftruncate, 0, (int fd, off_t size), (fd, size))
ON_FILE(int, ftruncate64, 0, (int fd, off64_t size), (fd, size))
ON_PATH(mkdir, 1, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, 1, folder, (int folder, const char *path, mode_t mode), (folder, path, mode))
ON_PATH(unlink, 0, AT_FDCWD, (const char *path), (path))
ON_PATH(unlinkat, 0, folder, (int folder, const char *path, int flags), (folder, path, flags))
ON_PATH(rmdir, 0, AT_FDCWD, (const char *path), (path))
ON_PATH(rename, 0, AT_FDCWD, (const char *path, const char *to), (path, to))
ON_PATH(renameat, 0, folder, (int folder, const char *path, int other, const char *to), (folder, path, other, to))
ON_PATH(renameat2, 0, folder, (int folder, const char *path, int other, const char *to, unsigned flags),
        (folder, path, other, to, flags))

#define OPENING(name, folder, parameters, arguments) \
  int name parameters { \
    ORIGINAL(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
      va_list rest; \
      va_start(rest, flags); \
      mode = va_arg(rest, mode_t); \
      va_end(rest); \
    } \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails_at(folder, path, #name, (flags & O_CREAT) != 0)) return -1; \
    return original arguments; \
  }

OPENING(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENING(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENING(openat, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPENING(openat64, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

#define STREAM(name) \
  FILE *name(const char *path, const char *mode) { \
    ORIGINAL(name); \
    return strpbrk(mode, "wa+") && fails_at(AT_FDCWD, path, #name, 1) ? NULL : original(path, mode); \
  }

STREAM(fopen)
STREAM(fopen64)
