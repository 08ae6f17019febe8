#include "expert-worker/registry.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/json.h"
#include "common/log.h"

#define RETRY_NS (250 * MOE_NS_PER_MS) /* while the store does not answer */
#define MAX_ID_BYTES 63

struct moe_registration {
    moe_store *store;
    const moe_clock *clock;
    char key[MAX_ID_BYTES + 8]; /* "worker:<id>" */
    moe_buf value;              /* the lease's JSON */
    bool registered;            /* our first put, which replaces a predecessor's lease, has succeeded */
    moe_status last;
    int64_t next_ns;
    pthread_t thread;
    pthread_mutex_t mutex; /* running, stopping */
    pthread_cond_t stop_asked;
    bool running, stopping;
};

moe_status moe_registry_cluster_uuid(moe_store *store, char uuid[MOE_UUID_BYTES], moe_error *err) {
    moe_buf text = {0};
    bool found = false;
    moe_status status = store->ops->get(store, "meta", &text, &found, err);
    json_t *meta = status == MOE_OK && found ? json_loadb(moe_buf_text(&text), text.size, JSON_REJECT_DUPLICATES, NULL) : NULL;
    if (status == MOE_OK && !found)
        status = moe_fail(err, MOE_NOT_FOUND, "no router has made this cluster yet");
    else if (status == MOE_OK && !moe_json_get_text(meta, "uuid", uuid, MOE_UUID_BYTES))
        status = moe_fail(err, MOE_DATA_LOSS, "the cluster's meta in the store is not readable");
    json_decref(meta);
    moe_buf_free(&text);
    return status;
}

static bool write_value(const moe_registration_config *c, moe_buf *out) {
    return moe_json_write(
        json_pack("{s:s, s:o, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:s, s:o}", "id", c->id, "incarnation",
                  moe_json_hex(c->incarnation), "endpoint", c->endpoint, "public_key", c->public_key, "host", c->host, "pid",
                  (json_int_t)c->pid, "capacity_experts", (json_int_t)c->capacity_experts, "expert_ns", (json_int_t)c->expert_ns,
                  "row_ns", (json_int_t)c->row_ns, "profile", c->profile, "model_digest", moe_json_hex(c->model_digest)),
        out);
}

static bool valid_id(const char *id) {
    size_t length = strlen(id);
    return length >= 1 && length <= MAX_ID_BYTES &&
           strspn(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == length;
}

moe_status moe_registration_new(const moe_registration_config *config, moe_registration **out, moe_error *err) {
    if (!valid_id(config->id)) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "worker id \"%s\": 1 to %d letters, digits, '.', '_' or '-' are needed",
                        config->id, MAX_ID_BYTES);
    }
    moe_registration *r = moe_calloc(1, sizeof *r);
    if (!r || !write_value(config, &r->value)) {
        if (r) moe_buf_free(&r->value);
        moe_free(r);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the registration, or a field is not UTF-8");
    }
    r->store = config->store;
    r->clock = config->clock;
    snprintf(r->key, sizeof r->key, "worker:%s", config->id);
    pthread_mutex_init(&r->mutex, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&r->stop_asked, &attributes);
    pthread_condattr_destroy(&attributes);
    *out = r;
    return MOE_OK;
}

void moe_registration_free(moe_registration **registration) {
    moe_registration *r = *registration;
    *registration = NULL;
    if (!r) return;
    moe_registration_stop(r);
    pthread_cond_destroy(&r->stop_asked);
    pthread_mutex_destroy(&r->mutex);
    moe_buf_free(&r->value);
    moe_free(r);
}

static void log_change(const moe_registration *r, moe_status status, const moe_error *err) {
    if (status == r->last && r->registered) return;
    if (status == MOE_OK) {
        moe_info("registered as %s", r->key);
    } else if (status == MOE_ABORTED) {
        moe_error_log("%s: a newer process has registered under this id; this one gets no work", r->key);
    } else if (status != r->last) {
        moe_warn("registering %s failed: %s; trying again", r->key, err->message);
    }
}

moe_status moe_registration_step(moe_registration *r, moe_error *err) {
    int64_t now = moe_now_ns(r->clock);
    if (now < r->next_ns) return r->last;
    moe_error failure = {0};
    moe_status status = (r->registered ? r->store->ops->take_lease : r->store->ops->put_lease)(
        r->store, r->key, r->value.data, r->value.size, MOE_WORKER_LEASE_TTL_MS, &failure);
    log_change(r, status, &failure);
    if (status == MOE_OK) r->registered = true;
    r->last = status;
    r->next_ns = now + (status == MOE_OK || status == MOE_ABORTED ? MOE_WORKER_LEASE_RENEW_NS : RETRY_NS);
    return status ? moe_fail(err, status, "%s", failure.message) : MOE_OK;
}

int64_t moe_registration_next_ns(const moe_registration *r) { return r->next_ns; }

moe_status moe_registration_leave(moe_registration *r, moe_error *err) {
    if (!r->registered) return MOE_OK;
    moe_store_write removal = {.key = r->key};
    moe_status status = r->store->ops->compare_and_set(r->store, r->key, r->value.data, r->value.size, &removal, 1, err);
    r->registered = false;
    return status == MOE_ABORTED ? MOE_OK : status;
}

static void *run(void *arg) {
    moe_registration *r = arg;
    pthread_mutex_lock(&r->mutex);
    while (!r->stopping) {
        pthread_mutex_unlock(&r->mutex);
        moe_registration_step(r, NULL);
        pthread_mutex_lock(&r->mutex);
        struct timespec until = {.tv_sec = r->next_ns / MOE_NS_PER_S, .tv_nsec = r->next_ns % MOE_NS_PER_S};
        if (!r->stopping) pthread_cond_timedwait(&r->stop_asked, &r->mutex, &until);
    }
    pthread_mutex_unlock(&r->mutex);
    return NULL;
}

moe_status moe_registration_start(moe_registration *r, moe_error *err) {
    MOE_ASSERT(!r->running);
    r->stopping = false;
    if (pthread_create(&r->thread, NULL, run, r) != 0) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "no thread for the registration");
    }
    r->running = true;
    return MOE_OK;
}

void moe_registration_stop(moe_registration *r) {
    if (!r->running) return;
    pthread_mutex_lock(&r->mutex);
    r->stopping = true;
    pthread_cond_signal(&r->stop_asked);
    pthread_mutex_unlock(&r->mutex);
    pthread_join(r->thread, NULL);
    r->running = false;
}
