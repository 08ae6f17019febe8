/* The unix socket of a connection: who is at the other end, and the memory that is handed over. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/shm/shm_internal.h"
#include "common/socket_file.h"

#define VERSION 1
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW) /* so that no page goes away under either side */

/* Both greetings; the layout of the memory follows from the version and ring_bytes. */
typedef struct greeting {
    char name[8];
    uint32_t version, ring_bytes;
} greeting;

static const greeting ours = {.name = "moe-shm", .version = VERSION, .ring_bytes = MOE_SHM_RING_BYTES};

moe_status moe_shm_parse_endpoint(const char *text, struct sockaddr_un *out, moe_error *err) {
    const char *path = text + strlen("shm:");
    if (strncmp(text, "shm:/", strlen("shm:/")) != 0 || strlen(text) >= MOE_ENDPOINT_BYTES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "endpoint \"%.64s\": want \"shm:/path\" of less than %d bytes", text,
                        MOE_ENDPOINT_BYTES);
    }
    return moe_socket_address(path, out, err);
}

bool moe_shm_same_user(int fd) {
    struct ucred other;
    socklen_t size = sizeof other;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &other, &size) == 0 && other.uid == geteuid();
}

static void *map_memory(int memory) {
    void *map = mmap(NULL, MOE_SHM_MAP_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    return map == MAP_FAILED ? NULL : map;
}

int moe_shm_memory_new(void **map) {
    *map = NULL;
    int memory = memfd_create("moesaic-shm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (memory < 0) return -1;
    /* The pages are had now, so that a lack of them is an error here and no signal later. */
    bool made = fallocate(memory, 0, 0, MOE_SHM_MAP_BYTES) == 0 && fcntl(memory, F_ADD_SEALS, SEALS | F_SEAL_SEAL) == 0 &&
                (*map = map_memory(memory)) != NULL;
    if (made) return memory;
    int reason = errno;
    close(memory);
    errno = reason;
    return -1;
}

void *moe_shm_memory_map(int memory) {
    struct stat file;
    int seals = fcntl(memory, F_GET_SEALS);
    if (seals < 0 || (seals & SEALS) != SEALS || fstat(memory, &file) != 0) return NULL;
    return file.st_size == (off_t)MOE_SHM_MAP_BYTES ? map_memory(memory) : NULL;
}

bool moe_shm_greet(int fd, int memory) {
    greeting text = ours;
    struct iovec part = {.iov_base = &text, .iov_len = sizeof text};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {.bytes = {0}};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (memory >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof memory);
        memcpy(CMSG_DATA(header), &memory, sizeof memory);
    }
    return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == sizeof text;
}

/* The first descriptor of a message; the kernel closes those that had no room, so there is no other. */
static int first_descriptor(struct msghdr *message) {
    int fd = -1;
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS && header->cmsg_len >= CMSG_LEN(sizeof fd))
        memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

shm_greeting moe_shm_read_greeting(int fd, int *memory) {
    greeting text;
    struct iovec part = {.iov_base = &text, .iov_len = sizeof text};
    union {
        char bytes[CMSG_LEN(sizeof(int))]; /* room for one descriptor, none for another in the padding */
        struct cmsghdr align;
    } control;
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = CMSG_LEN(sizeof(int))};
    ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    *memory = got >= 0 ? first_descriptor(&message) : -1;
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return GREETING_NONE;
    return got == sizeof text && memcmp(&text, &ours, sizeof text) == 0 ? GREETING_GOOD : GREETING_BAD;
}
