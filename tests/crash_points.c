/* Preloaded into a program, counts what it does to the files of some folders, and has something happen at the N-th point.
 *
 * A point is a call of libc that changes a file system: each is one that a crash may come just before, and a write one
 * that it may come in the middle of.
 *
 * CRASH_COMMAND   only in processes whose command line, its words joined by blanks, contains this
 * CRASH_FOLDERS   only for paths that begin with one of these, separated by colons
 * CRASH_LOG       each point is written to this file, a line each: process, call, path
 * CRASH_AT        the number of the point, from 1 on; 0 for none
 * CRASH_HOW       kill: the process kills itself; torn: half of a write is done before; full: from here on, there is no
 *                 room on the disk for anything in the folders
 * CRASH_FIRED     a file that is made when it happens; where it is there already, nothing happens
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int active, full;
static long count, at;
static char folders[4096], log_file[4096], fired[4096], how[16];

static void setting(const char *name, char *place, size_t size)
{
    const char *text = getenv(name);
    snprintf(place, size, "%s", text ? text : "");
}

__attribute__((constructor)) static void begin(void)
{
    char wanted[4096], number[32], line[65536];
    setting("CRASH_COMMAND", wanted, sizeof wanted);
    setting("CRASH_FOLDERS", folders, sizeof folders);
    setting("CRASH_LOG", log_file, sizeof log_file);
    setting("CRASH_FIRED", fired, sizeof fired);
    setting("CRASH_HOW", how, sizeof how);
    setting("CRASH_AT", number, sizeof number);
    at = atol(number);
    int fd = syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    long size = fd < 0 ? 0 : syscall(SYS_read, fd, line, sizeof line - 1);
    if (fd >= 0)
        syscall(SYS_close, fd);
    if (size <= 0 || !*wanted)
        return;
    line[size] = 0;
    for (long i = 0; i < size; i++)
        if (!line[i])
            line[i] = ' ';
    active = strstr(line, wanted) != NULL;
}

static int is_ours(const char *path)
{
    for (const char *each = folders; *each;) {
        size_t length = strcspn(each, ":");
        if (length && !strncmp(path, each, length))
            return 1;
        each += length + (each[length] == ':');
    }
    return 0;
}

static void path_of(int fd, const char *name, char *path, size_t size)
{
    char link[64];
    if (name && name[0] == '/') {
        snprintf(path, size, "%s", name);
        return;
    }
    if (fd == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
    path[length < 0 ? 0 : length] = 0;
    if (name)
        snprintf(path + strlen(path), size - strlen(path), "/%s", name);
}

/* Returns 0 where the call may go on, 1 where it fails for want of room, 2 where half of it is done before a kill. */
static int point(const char *call, int fd, const char *name, int needs_room)
{
    char path[8192], line[9000];
    int saved = errno, result = 0;
    if (!active)
        return 0;
    path_of(fd, name, path, sizeof path);
    if (is_ours(path)) {
        count++;
        if (*log_file) {
            int out = syscall(SYS_openat, AT_FDCWD, log_file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
            int length = snprintf(line, sizeof line, "%d %s %s\n", (int)getpid(), call, path);
            syscall(SYS_write, out, line, length);
            syscall(SYS_close, out);
        }
        if (at && count == at) {
            int made = syscall(SYS_openat, AT_FDCWD, fired, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
            if (made >= 0) {
                syscall(SYS_close, made);
                if (!strcmp(how, "full"))
                    full = 1;
                else if (!strcmp(how, "torn") && !strcmp(call, "write"))
                    result = 2;
                else
                    syscall(SYS_kill, getpid(), SIGKILL);
            }
        }
        if (full && needs_room)
            result = 1;
    }
    errno = saved;
    return result;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OR_FULL(call, fd, name, room)                                                                                  \
    if (point(call, fd, name, room)) {                                                                                 \
        errno = ENOSPC;                                                                                                \
        return -1;                                                                                                     \
    }

static int is_missing(int fd, const char *name)
{
    struct stat about;
    int saved = errno, missing = fstatat(fd, name, &about, AT_SYMLINK_NOFOLLOW) != 0;
    errno = saved;
    return missing;
}

#define CHANGES(flags) ((flags) & (O_TRUNC | O_CREAT))

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        if (active && CHANGES(flags)) {                                                                                \
            int missing = is_missing(AT_FDCWD, path);                                                                  \
            if (missing || (flags & O_TRUNC))                                                                          \
                OR_FULL("open", AT_FDCWD, path, missing)                                                               \
        }                                                                                                              \
        return NEXT(name)(path, flags, mode);                                                                          \
    }
#define OPENAT(name)                                                                                                   \
    int name(int fd, const char *path, int flags, ...)                                                                 \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        if (active && CHANGES(flags)) {                                                                                \
            int missing = is_missing(fd, path);                                                                        \
            if (missing || (flags & O_TRUNC))                                                                          \
                OR_FULL("open", fd, path, missing)                                                                     \
        }                                                                                                              \
        return NEXT(name)(fd, path, flags, mode);                                                                      \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size)
{
    int outcome = active && fd > 2 ? point("write", fd, NULL, 1) : 0;
    if (outcome == 1) {
        errno = ENOSPC;
        return -1;
    }
    if (outcome == 2) {
        syscall(SYS_write, fd, data, size / 2);
        syscall(SYS_kill, getpid(), SIGKILL);
    }
    return NEXT(write)(fd, data, size);
}

int rename(const char *from, const char *to)
{
    OR_FULL("rename", AT_FDCWD, to, 0)
    return NEXT(rename)(from, to);
}

int renameat(int from_fd, const char *from, int to_fd, const char *to)
{
    OR_FULL("rename", to_fd, to, 0)
    return NEXT(renameat)(from_fd, from, to_fd, to);
}

int link(const char *from, const char *to)
{
    OR_FULL("link", AT_FDCWD, to, 1)
    return NEXT(link)(from, to);
}

int symlink(const char *from, const char *to)
{
    OR_FULL("symlink", AT_FDCWD, to, 1)
    return NEXT(symlink)(from, to);
}

int unlink(const char *path)
{
    OR_FULL("unlink", AT_FDCWD, path, 0)
    return NEXT(unlink)(path);
}

int unlinkat(int fd, const char *path, int flags)
{
    OR_FULL("unlink", fd, path, 0)
    return NEXT(unlinkat)(fd, path, flags);
}

int mkdir(const char *path, mode_t mode)
{
    OR_FULL("mkdir", AT_FDCWD, path, 1)
    return NEXT(mkdir)(path, mode);
}

int mkdirat(int fd, const char *path, mode_t mode)
{
    OR_FULL("mkdir", fd, path, 1)
    return NEXT(mkdirat)(fd, path, mode);
}

int rmdir(const char *path)
{
    OR_FULL("rmdir", AT_FDCWD, path, 0)
    return NEXT(rmdir)(path);
}

int fsync(int fd)
{
    OR_FULL("fsync", fd, NULL, 0)
    return NEXT(fsync)(fd);
}

int ftruncate(int fd, off_t size)
{
    OR_FULL("ftruncate", fd, NULL, 0)
    return NEXT(ftruncate)(fd, size);
}

int ftruncate64(int fd, off64_t size)
{
    OR_FULL("ftruncate", fd, NULL, 0)
    return NEXT(ftruncate64)(fd, size);
}

int chmod(const char *path, mode_t mode)
{
    OR_FULL("chmod", AT_FDCWD, path, 0)
    return NEXT(chmod)(path, mode);
}

int fchmod(int fd, mode_t mode)
{
    OR_FULL("chmod", fd, NULL, 0)
    return NEXT(fchmod)(fd, mode);
}

int utimensat(int fd, const char *path, const struct timespec times[2], int flags)
{
    OR_FULL("utime", fd, path, 0)
    return NEXT(utimensat)(fd, path, times, flags);
}
