/* Intrusive doubly linked lists: an element is taken out in O(1) wherever it is, so a callback may remove any element. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

#define MOE_CONTAINER_OF(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

typedef struct moe_list {
    struct moe_list *prev, *next; /* a head that is empty points to itself */
} moe_list;

static inline void moe_list_init(moe_list *head) { head->prev = head->next = head; }
static inline bool moe_list_empty(const moe_list *head) { return head->next == head; }

static inline void moe_list_append(moe_list *head, moe_list *node) {
    node->prev = head->prev;
    node->next = head;
    head->prev->next = node;
    head->prev = node;
}

static inline void moe_list_remove(moe_list *node) {
    node->prev->next = node->next;
    node->next->prev = node->prev;
    moe_list_init(node);
}

static inline void moe_list_move(moe_list *head, moe_list *node) {
    moe_list_remove(node);
    moe_list_append(head, node);
}

/* Appends all of `from` to `to` in order; `from` is empty afterwards. */
static inline void moe_list_splice(moe_list *to, moe_list *from) {
    while (!moe_list_empty(from)) moe_list_move(to, from->next);
}
