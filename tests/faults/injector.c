/* Makes the k-th call of one kind fail, for a process started with LD_PRELOAD=injector.so.
 *
 * Calls are counted, and fail, between fault_arm and fault_disarm. Opens count if their path lies below the
 * directory given to fault_place; reads, writes and the like if they are not of the standard streams;
 * mappings if they are of files; closings if of files open for writing; allocations if they are large enough
 * that a program may be expected to check them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind {
  NONE,
  WRITE,
  READ,
  SYNC,
  ALLOCATE,
  RENAME,
  RENAME_FLAGS,
  OPEN,
  MKDIR,
  LINK,
  MMAP,
  MALLOC,
  CLOSE,
  LOCK
};
enum mode { ONCE, FROM_THEN_ON, SHORT_ONCE, SHORT_FROM_THEN_ON };

static atomic_int armed_kind, armed_code, armed_mode;
static atomic_long calls, first;
static char place[4096];
static const size_t large = 32 << 10;

void fault_place(const char* directory) { strncpy(place, directory, sizeof place - 1); }

void fault_arm(int kind, long k, int code, int mode) {
  calls = 0;
  first = k;
  armed_code = code;
  armed_mode = mode;
  armed_kind = kind;
}

long fault_disarm(void) {
  armed_kind = NONE;
  return calls;
}

/* Whether this call is to fail (or to be short). */
static int hit(enum kind kind) {
  if (armed_kind != (int)kind) return 0;
  long number = ++calls;
  int always = armed_mode == FROM_THEN_ON || armed_mode == SHORT_FROM_THEN_ON;
  return number == first || (always && number > first);
}

static int is_short(void) { return armed_mode == SHORT_ONCE || armed_mode == SHORT_FROM_THEN_ON; }

static int ours(const char* path) {
  if (path[0] != '/') return place[0] != 0;
  return place[0] && strncmp(path, place, strlen(place)) == 0;
}

#define REAL(name, type, ...)       \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define FAIL_IF(kind, value) \
  if (hit(kind)) {           \
    errno = armed_code;      \
    return value;            \
  }

/* A transfer of `size` bytes that may fail, or move a part only. */
#define TRANSFER(kind, fd, size)     \
  if (fd > 2 && size && hit(kind)) { \
    if (!is_short()) {               \
      errno = armed_code;            \
      return -1;                     \
    }                                \
    size = (size + 1) / 2;           \
  }

ssize_t write(int fd, const void* data, size_t size) {
  REAL("write", ssize_t, int, const void*, size_t);
  TRANSFER(WRITE, fd, size)
  return real(fd, data, size);
}

ssize_t pwrite64(int fd, const void* data, size_t size, off_t offset) {
  REAL("pwrite64", ssize_t, int, const void*, size_t, off_t);
  TRANSFER(WRITE, fd, size)
  return real(fd, data, size, offset);
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  return pwrite64(fd, data, size, offset);
}

ssize_t sendfile64(int out, int in, off_t* offset, size_t size) {
  REAL("sendfile64", ssize_t, int, int, off_t*, size_t);
  TRANSFER(WRITE, out, size)
  return real(out, in, offset, size);
}
ssize_t sendfile(int out, int in, off_t* offset, size_t size) { return sendfile64(out, in, offset, size); }

ssize_t read(int fd, void* data, size_t size) {
  REAL("read", ssize_t, int, void*, size_t);
  TRANSFER(READ, fd, size)
  return real(fd, data, size);
}

ssize_t pread64(int fd, void* data, size_t size, off_t offset) {
  REAL("pread64", ssize_t, int, void*, size_t, off_t);
  TRANSFER(READ, fd, size)
  return real(fd, data, size, offset);
}
ssize_t pread(int fd, void* data, size_t size, off_t offset) { return pread64(fd, data, size, offset); }

ssize_t preadv64(int fd, const struct iovec* parts, int count, off_t offset) {
  REAL("preadv64", ssize_t, int, const struct iovec*, int, off_t);
  if (count == 1) {
    struct iovec part = parts[0];
    TRANSFER(READ, fd, part.iov_len)
    return real(fd, &part, 1, offset);
  }
  return real(fd, parts, count, offset);
}
ssize_t preadv(int fd, const struct iovec* parts, int count, off_t offset) {
  return preadv64(fd, parts, count, offset);
}

ssize_t preadv64v2(int fd, const struct iovec* parts, int count, off_t offset, int flags) {
  REAL("preadv64v2", ssize_t, int, const struct iovec*, int, off_t, int);
  if (count == 1) {
    struct iovec part = parts[0];
    TRANSFER(READ, fd, part.iov_len)
    return real(fd, &part, 1, offset, flags);
  }
  return real(fd, parts, count, offset, flags);
}
ssize_t preadv2(int fd, const struct iovec* parts, int count, off_t offset, int flags) {
  return preadv64v2(fd, parts, count, offset, flags);
}

int fsync(int fd) {
  REAL("fsync", int, int);
  FAIL_IF(SYNC, -1)
  return real(fd);
}

int fdatasync(int fd) {
  REAL("fdatasync", int, int);
  FAIL_IF(SYNC, -1)
  return real(fd);
}

int posix_fallocate64(int fd, off_t offset, off_t size) {
  REAL("posix_fallocate64", int, int, off_t, off_t);
  if (hit(ALLOCATE)) return armed_code;
  return real(fd, offset, size);
}
int posix_fallocate(int fd, off_t offset, off_t size) { return posix_fallocate64(fd, offset, size); }

int ftruncate64(int fd, off_t size) {
  REAL("ftruncate64", int, int, off_t);
  FAIL_IF(ALLOCATE, -1)
  return real(fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int rename(const char* from, const char* to) {
  REAL("rename", int, const char*, const char*);
  FAIL_IF(RENAME, -1)
  return real(from, to);
}

int renameat(int from_fd, const char* from, int to_fd, const char* to) {
  REAL("renameat", int, int, const char*, int, const char*);
  FAIL_IF(RENAME, -1)
  return real(from_fd, from, to_fd, to);
}

int renameat2(int from_fd, const char* from, int to_fd, const char* to, unsigned flags) {
  REAL("renameat2", int, int, const char*, int, const char*, unsigned);
  FAIL_IF(RENAME, -1)
  FAIL_IF(RENAME_FLAGS, -1)
  return real(from_fd, from, to_fd, to, flags);
}

#define MODE_OF(flags)                 \
  mode_t mode = 0;                     \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list list;                      \
    va_start(list, flags);             \
    mode = va_arg(list, mode_t);       \
    va_end(list);                      \
  }

int open64(const char* path, int flags, ...) {
  REAL("open64", int, const char*, int, ...);
  MODE_OF(flags)
  if (ours(path)) FAIL_IF(OPEN, -1)
  return real(path, flags, mode);
}

int open(const char* path, int flags, ...) {
  REAL("open", int, const char*, int, ...);
  MODE_OF(flags)
  if (ours(path)) FAIL_IF(OPEN, -1)
  return real(path, flags, mode);
}

int openat64(int fd, const char* path, int flags, ...) {
  REAL("openat64", int, int, const char*, int, ...);
  MODE_OF(flags)
  if (ours(path)) FAIL_IF(OPEN, -1)
  return real(fd, path, flags, mode);
}

int openat(int fd, const char* path, int flags, ...) {
  REAL("openat", int, int, const char*, int, ...);
  MODE_OF(flags)
  if (ours(path)) FAIL_IF(OPEN, -1)
  return real(fd, path, flags, mode);
}

int mkdir(const char* path, mode_t mode) {
  REAL("mkdir", int, const char*, mode_t);
  FAIL_IF(MKDIR, -1)
  return real(path, mode);
}

int link(const char* from, const char* to) {
  REAL("link", int, const char*, const char*);
  FAIL_IF(LINK, -1)
  return real(from, to);
}

int linkat(int from_fd, const char* from, int to_fd, const char* to, int flags) {
  REAL("linkat", int, int, const char*, int, const char*, int);
  FAIL_IF(LINK, -1)
  return real(from_fd, from, to_fd, to, flags);
}

int flock(int fd, int operation) {
  REAL("flock", int, int, int);
  FAIL_IF(LOCK, -1)
  return real(fd, operation);
}

int close(int fd) { /* the descriptor is gone, whatever it returns */
  REAL("close", int, int);
  int flags = armed_kind == CLOSE ? fcntl(fd, F_GETFL) : -1;
  int result = real(fd);
  if (fd > 2 && flags >= 0 && (flags & O_ACCMODE) != O_RDONLY) FAIL_IF(CLOSE, -1)
  return result;
}

void* mmap64(void* address, size_t size, int protection, int flags, int fd, off_t offset) {
  REAL("mmap64", void*, void*, size_t, int, int, int, off_t);
  if (fd >= 0)
    FAIL_IF(MMAP, MAP_FAILED) /* Python cannot start a thread without memory of its own: it waits */
  return real(address, size, protection, flags, fd, offset);
}
void* mmap(void* address, size_t size, int protection, int flags, int fd, off_t offset) {
  return mmap64(address, size, protection, flags, fd, offset);
}

/* glibc's own names: dlsym itself allocates. */
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t size) {
  if (size >= large) FAIL_IF(MALLOC, NULL)
  return __libc_malloc(size);
}

void* calloc(size_t count, size_t size) {
  if (size && count >= large / size) FAIL_IF(MALLOC, NULL)
  return __libc_calloc(count, size);
}

void* realloc(void* old, size_t size) {
  if (size >= large) FAIL_IF(MALLOC, NULL)
  return __libc_realloc(old, size);
}

int posix_memalign(void** result, size_t alignment, size_t size) {
  if (size >= large && hit(MALLOC)) return ENOMEM;
  *result = __libc_memalign(alignment, size);
  return *result ? 0 : ENOMEM;
}

void* aligned_alloc(size_t alignment, size_t size) {
  if (size >= large) FAIL_IF(MALLOC, NULL)
  return __libc_memalign(alignment, size);
}
