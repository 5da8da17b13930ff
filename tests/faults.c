/* Disk faults on demand: preloaded into a process, fails, shortens or dies at the k-th call that changes something below a folder, and writes down each of them.

   cc -shared -fPIC -O2 -o faults.so faults.c -ldl;  LD_PRELOAD=./faults.so python ...;  from there through ctypes the functions faults_*.
   benchmarks/scripts/faults.py drives it. Linux: where a file descriptor leads is read in /proc.

   safetensors renames its files past libc, by the system call itself: faults_trap has the kernel hand each of those over, and they are counted as any other.

   The log, one record a call that succeeded: number, operation, path, second path, offset, bytes (tab-separated, a newline), then the bytes that were written. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { NOTHING, ERROR, FULL, SHORT, CUT, TORN };          /* what happens at the k-th call */
enum { NAME = 1, WRITE = 2, NEEDS_SPACE = 4 };            /* what kind of call it is */

static char folder[PATH_MAX];
static int log_fd = -1, mode = NOTHING, full = 0, fired = 0;
static long armed = 0, count = 0;

void faults_watch(const char *path, int fd) { strncpy(folder, path, sizeof folder - 1); log_fd = fd; count = armed = 0; full = fired = 0; mode = NOTHING; }
void faults_arm(long k, int what) { armed = k; mode = what; count = 0; full = fired = 0; }
long faults_count(void) { return count; }
int faults_fired(void) { return fired; }

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

static int below(const char *path) {
    size_t n = strlen(folder);
    return n && strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int of_fd(int fd, char *out) {                     /* the path of a descriptor, where it is one below the folder */
    char link[64];
    if (!folder[0] || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return below(out);
}

static int of_path(int dir, const char *path, char *out) {
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') {
        strncpy(out, path, PATH_MAX - 1);
    } else {
        char base[PATH_MAX] = "";
        if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
        if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    }
    return below(out);
}

/* Count a call. 0: let it through; -1: it fails, errno is set; 1: half of it is written (then *die says whether the power goes). */
static int struck(int kind, size_t bytes, int *die) {
    *die = 0;
    count++;
    if (full && (kind & NEEDS_SPACE)) { errno = ENOSPC; return -1; }
    if (count != armed) return 0;
    fired = 1;
    switch (mode) {
    case ERROR: errno = EIO; return -1;
    case FULL: full = 1; errno = ENOSPC; return -1;
    case CUT: syscall(SYS_exit_group, 77); return 0;
    case SHORT:
        full = 1;
        if ((kind & WRITE) && bytes > 1) return 1;
        errno = ENOSPC;
        return -1;
    case TORN:
        if (!(kind & WRITE)) { fired = 0; return 0; }
        *die = 1;
        return 1;
    }
    return 0;
}

static void note(const char *op, const char *a, const char *b, long offset, const void *data, size_t bytes) {
    if (log_fd < 0) return;
    int kept = errno;
    char head[2 * PATH_MAX + 128];
    int n = snprintf(head, sizeof head, "%ld\t%s\t%s\t%s\t%ld\t%zu\n", count, op, a, b, offset, data ? bytes : 0);
    syscall(SYS_write, log_fd, head, n);
    if (data && bytes) syscall(SYS_write, log_fd, data, bytes);
    errno = kept;
}

/* -- bytes ---------------------------------------------------------------------------------------------------------------------------- */

static ssize_t writes(int fd, const void *data, size_t bytes, off_t at, int positioned) {
    char path[PATH_MAX];
    int die = 0, hit = of_fd(fd, path) ? struck(WRITE | NEEDS_SPACE, bytes, &die) : 0, ours = folder[0] && of_fd(fd, path);
    if (hit < 0) return -1;
    if (hit > 0) bytes /= 2;
    struct stat s;
    off_t offset = at;
    if (ours && !positioned) offset = (fcntl(fd, F_GETFL) & O_APPEND) && fstat(fd, &s) == 0 ? s.st_size : lseek(fd, 0, SEEK_CUR);
    ssize_t done = positioned ? syscall(SYS_pwrite64, fd, data, bytes, at) : syscall(SYS_write, fd, data, bytes);
    if (ours && done > 0) note("write", path, "", offset, data, done);
    if (die) syscall(SYS_exit_group, 77);
    return done;
}

ssize_t write(int fd, const void *data, size_t bytes) { return writes(fd, data, bytes, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t at) { return writes(fd, data, bytes, at, 1); }
ssize_t pwrite64(int fd, const void *data, size_t bytes, off_t at) { return writes(fd, data, bytes, at, 1); }

ssize_t writev(int fd, const struct iovec *parts, int n) {
    char path[PATH_MAX];
    if (!of_fd(fd, path)) return syscall(SYS_writev, fd, parts, n);
    ssize_t done = 0;                                     /* one call after another: each may be the one */
    for (int i = 0; i < n; i++) {
        ssize_t m = writes(fd, parts[i].iov_base, parts[i].iov_len, 0, 0);
        if (m < 0) return done ? done : -1;
        done += m;
        if ((size_t)m < parts[i].iov_len) break;
    }
    return done;
}

static int truncates(int fd, const char *path, off_t size) {
    int die;
    if (struck(NEEDS_SPACE, 0, &die)) return -1;
    int r = path[0] && fd < 0 ? syscall(SYS_truncate, path, size) : syscall(SYS_ftruncate, fd, size);
    if (r == 0) note("truncate", path, "", size, 0, 0);
    return r;
}

int ftruncate(int fd, off_t size) { char p[PATH_MAX]; return of_fd(fd, p) ? truncates(fd, p, size) : syscall(SYS_ftruncate, fd, size); }
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }
int truncate(const char *path, off_t size) { char p[PATH_MAX]; return of_path(AT_FDCWD, path, p) ? truncates(-1, p, size) : syscall(SYS_truncate, path, size); }
int truncate64(const char *path, off_t size) { return truncate(path, size); }

static int syncs(int fd, long number) {
    char p[PATH_MAX];
    int die, ours = of_fd(fd, p);
    if (ours && struck(0, 0, &die)) return -1;
    int r = syscall(number, fd);
    if (ours && r == 0) note("fsync", p, "", 0, 0, 0);
    return r;
}

int fsync(int fd) { return syncs(fd, SYS_fsync); }
int fdatasync(int fd) { return syncs(fd, SYS_fdatasync); }

/* A file mapped for writing would change behind the log's back: it is counted and written down, and the driver refuses a log that has one. */
void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    char p[PATH_MAX];
    int die;
    if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED) && of_fd(fd, p)) {
        if (struck(0, 0, &die)) return MAP_FAILED;
        note("mmap", p, "", offset, 0, 0);
    }
    return (void *)syscall(SYS_mmap, at, bytes, protection, flags, fd, offset);
}
void *mmap64(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) { return mmap(at, bytes, protection, flags, fd, offset); }

/* -- names ---------------------------------------------------------------------------------------------------------------------------- */

static int opens(int dir, const char *path, int flags, mode_t rights) {
    char p[PATH_MAX];
    int die, ours = (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE && of_path(dir, path, p);
    struct stat s;
    int there = ours && fstatat(dir, path, &s, 0) == 0;
    if (ours && struck(there ? 0 : NEEDS_SPACE, 0, &die)) return -1;
    int fd = syscall(SYS_openat, dir, path, flags, rights);
    if (ours && fd >= 0) note(!there ? "create" : flags & O_TRUNC ? "empty" : "open", p, "", 0, 0, 0);
    return fd;
}

#define RIGHTS(flags, last) mode_t rights = 0; if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { va_list v; va_start(v, last); rights = va_arg(v, int); va_end(v); }
int open(const char *path, int flags, ...) { RIGHTS(flags, flags) return opens(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) { RIGHTS(flags, flags) return opens(AT_FDCWD, path, flags | O_LARGEFILE, rights); }
int openat(int dir, const char *path, int flags, ...) { RIGHTS(flags, flags) return opens(dir, path, flags, rights); }
int openat64(int dir, const char *path, int flags, ...) { RIGHTS(flags, flags) return opens(dir, path, flags | O_LARGEFILE, rights); }

static FILE *fopens(const char *name, const char *path, const char *how) {
    char p[PATH_MAX];
    int die, ours = strpbrk(how, "wa+") && of_path(AT_FDCWD, path, p);
    struct stat s;
    int there = ours && stat(path, &s) == 0;
    if (ours && struck(there ? 0 : NEEDS_SPACE, 0, &die)) return NULL;
    FILE *f = ((FILE *(*)(const char *, const char *))next(name))(path, how);
    if (ours && f) note(!there ? "create" : how[0] == 'w' ? "empty" : "open", p, "", 0, 0, 0);
    return f;
}
FILE *fopen(const char *path, const char *how) { return fopens("fopen", path, how); }
FILE *fopen64(const char *path, const char *how) { return fopens("fopen64", path, how); }

/* Each calls the system once; `call` is that, of two paths the second is the one that comes to be. */
#define NAMED(op, kind, a, b, call)                        \
    char pa[PATH_MAX] = "", pb[PATH_MAX] = "";             \
    int die, in_a = a, in_b = b;                           \
    if ((in_a || in_b) && struck(kind, 0, &die)) return -1; \
    int r = call;                                          \
    if ((in_a || in_b) && r == 0) note(op, pa, pb, 0, 0, 0); \
    return r;

int renameat2(int da, const char *a, int db, const char *b, unsigned flags) {
    NAMED("rename", NAME, of_path(da, a, pa), of_path(db, b, pb), syscall(SYS_renameat2, da, a, db, b, flags))
}
int renameat(int da, const char *a, int db, const char *b) { return renameat2(da, a, db, b, 0); }
int rename(const char *a, const char *b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, 0); }
int linkat(int da, const char *a, int db, const char *b, int flags) {
    NAMED("link", NAME | NEEDS_SPACE, of_path(da, a, pa), of_path(db, b, pb), syscall(SYS_linkat, da, a, db, b, flags))
}
int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }
int symlinkat(const char *to, int db, const char *b) {
    NAMED("symlink", NAME | NEEDS_SPACE, (strncpy(pa, to, PATH_MAX - 1), 0), of_path(db, b, pb), syscall(SYS_symlinkat, to, db, b))
}
int symlink(const char *to, const char *b) { return symlinkat(to, AT_FDCWD, b); }
int unlinkat(int da, const char *a, int flags) {
    NAMED(flags & AT_REMOVEDIR ? "rmdir" : "unlink", NAME, of_path(da, a, pa), 0, syscall(SYS_unlinkat, da, a, flags))
}
int unlink(const char *a) { return unlinkat(AT_FDCWD, a, 0); }
int rmdir(const char *a) { return unlinkat(AT_FDCWD, a, AT_REMOVEDIR); }
int mkdirat(int da, const char *a, mode_t rights) {
    NAMED("mkdir", NAME | NEEDS_SPACE, of_path(da, a, pa), 0, syscall(SYS_mkdirat, da, a, rights))
}
int mkdir(const char *a, mode_t rights) { return mkdirat(AT_FDCWD, a, rights); }

/* -- past libc ------------------------------------------------------------------------------------------------------------------------- */

static void renames(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    mcontext_t *m = &((ucontext_t *)context)->uc_mcontext;
#if defined(__x86_64__)
    greg_t *r = m->gregs;
    int result = renameat2(r[REG_RDI], (const char *)r[REG_RSI], r[REG_RDX], (const char *)r[REG_R10], 0);
    r[REG_RAX] = result ? -errno : 0;
#elif defined(__aarch64__)
    int result = renameat2(m->regs[0], (const char *)m->regs[1], m->regs[2], (const char *)m->regs[3], 0);
    m->regs[0] = result ? -errno : 0;
#endif
}

/* From here on the system call renameat comes to renames(); 0, or -1 where the kernel does not let it. Ours is renameat2, which does not. */
int faults_trap(void) {
#if defined(__x86_64__) || defined(__aarch64__)
    struct sigaction action = {.sa_sigaction = renames, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof rules / sizeof *rules, rules};
    return sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
#else
    return -1;
#endif
}
