/* Copies one expert's canonical bytes from another worker by WorkerService/Fetch: piece by piece, at a limited rate; a piece that
 * fails is asked for again, over a new connection where the old one broke. The loop's thread only. */
#pragma once
#include "proto/rpc.h"

#define MOE_FETCH_PIECE_BYTES (1 << 20)
#define MOE_FETCH_TIMEOUT_NS (2 * MOE_NS_PER_S) /* of a piece, and of the connection */
#define MOE_FETCH_MAX_FAILURES 3                /* in a row */

typedef enum moe_fetch_state { MOE_FETCH_IDLE, MOE_FETCH_RUNNING, MOE_FETCH_DONE, MOE_FETCH_FAILED } moe_fetch_state;

typedef struct moe_fetch {
    moe_rpc **rpc; /* borrowed, as the clock; *rpc is there before the first begin */
    const moe_clock *clock;
    int64_t bytes_per_s; /* 0: no limit */
    moe_fetch_state state;
    char endpoint[MOE_ENDPOINT_BYTES];
    uint64_t link; /* 0: not connected */
    uint64_t incarnation;
    int32_t layer, expert;
    uint64_t digest; /* 0: any */
    uint8_t *bytes;  /* [total]; owned */
    int64_t total, at;
    bool calling;
    uint64_t call_id;
    int32_t failures;
    int64_t next_ns, give_up_ns; /* when the next piece is due; until when a connection is waited for */
    moe_error error;             /* where FAILED */
} moe_fetch;

void moe_fetch_init(moe_fetch *fetch, moe_rpc **rpc, const moe_clock *clock, int64_t bytes_per_s);
void moe_fetch_close(moe_fetch *fetch); /* cancels and frees; idempotent */

/* Begins a copy of `total` bytes; ends another one. */
void moe_fetch_begin(moe_fetch *fetch, const char *endpoint, uint64_t incarnation, int32_t layer, int32_t expert, uint64_t digest,
                     int64_t total);
moe_fetch_state moe_fetch_turn(moe_fetch *fetch);   /* asks for what is due */
uint8_t *moe_fetch_take(moe_fetch *fetch);          /* of a DONE copy: the bytes, now the caller's; IDLE again */
void moe_fetch_disconnect(moe_fetch *fetch);        /* nothing more is wanted for now */
int64_t moe_fetch_due_ns(const moe_fetch *fetch);   /* when a turn has something to do by itself; INT64_MAX: never */
