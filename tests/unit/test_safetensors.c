/* The safetensors reader: what it accepts, and every way in which a file or an index can be wrong. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/model/safetensors.h"
#include "common/model/safetensors_header.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define FIXTURES SOURCE_DIR "/tests/data/checkpoints/"
#define SINGLE "model.safetensors"
#define INDEX "model.safetensors.index.json"
#define TENSOR(name, dtype, shape, begin, end) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" begin "," end "]}"

static void expect_refused(const char *dir, moe_status code, const char *what) {
    moe_safetensors *c = NULL;
    moe_error err = {0};
    moe_status status = moe_safetensors_open(dir, &c, &err);
    if (status != code || !strstr(err.message, what))
        fail_msg("status %d, message \"%s\"; expected %d, \"%s\"", status, err.message, code, what);
    assert_null(c);
}

static void reads_tensors_by_name(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    const float f32[] = {1, 2, 3};
    const uint16_t bf16[] = {0x3f80, 0x4000};
    const moe_safetensor tensors[] = {{.name = "z", .dtype = MOE_F32, .num_dims = 1, .dims = {3}, .data = f32},
                                      {.name = "empty", .dtype = MOE_F16, .num_dims = 2, .dims = {0, 7}, .data = ""},
                                      {.name = "a", .dtype = MOE_BF16, .num_dims = 2, .dims = {1, 2}, .data = bf16},
                                      {.name = "scalar", .dtype = MOE_F32, .num_dims = 0, .data = f32},
                                      {.name = "last", .dtype = MOE_F32, .num_dims = 1, .dims = {0}, .data = ""}};
    moe_test_write_tensors(&dir, SINGLE, tensors, 5);
    moe_safetensors *c = NULL;
    assert_int_equal(moe_safetensors_open(dir.path, &c, NULL), MOE_OK);
    assert_int_equal(moe_safetensors_count(c), 5);
    for (int i = 1; i < 5; i++) assert_true(strcmp(moe_safetensors_at(c, i - 1)->name, moe_safetensors_at(c, i)->name) < 0);
    assert_null(moe_safetensors_find(c, "b"));
    const moe_safetensor *z = moe_safetensors_find(c, "z"), *a = moe_safetensors_find(c, "a");
    assert_memory_equal(z->data, f32, sizeof f32);
    assert_int_equal(z->bytes, sizeof f32);
    assert_memory_equal(a->data, bf16, sizeof bf16);
    assert_int_equal(a->dims[1], 2);
    assert_int_equal(moe_safetensors_find(c, "scalar")->bytes, 4);
    assert_int_equal(moe_safetensors_find(c, "empty")->bytes, 0);
    assert_non_null(moe_safetensors_find(c, "last")->data);
    moe_safetensors_close(&c);
    moe_safetensors_close(&c);
    assert_null(c);
    moe_test_dir_free(&dir);
}

static void accepts_metadata_padding_and_no_tensors(void **state) {
    (void)state;
    static const char *const headers[] = {"{}", "{\"__metadata__\":{\"format\":\"pt\"}}   ", " {} \n"};
    moe_test_dir dir = moe_test_dir_new();
    for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
        moe_safetensors *c = NULL;
        moe_test_write_header(&dir, SINGLE, headers[i], 0);
        assert_int_equal(moe_safetensors_open(dir.path, &c, NULL), MOE_OK);
        assert_int_equal(moe_safetensors_count(c), 0);
        assert_null(moe_safetensors_find(c, "x"));
        moe_safetensors_close(&c);
    }
    moe_test_dir_free(&dir);
}

static void refuses_bad_headers(void **state) {
    (void)state;
    static const struct {
        const char *header;
        size_t data_bytes;
        moe_status code;
        const char *what;
    } rows[] = {
        {"", 0, MOE_INVALID_ARGUMENT, "bad JSON"},
        {"{", 0, MOE_INVALID_ARGUMENT, "bad JSON"},
        {"[]", 0, MOE_INVALID_ARGUMENT, "not an object"},
        {"{} x", 0, MOE_INVALID_ARGUMENT, "bad JSON"},
        {"{\"a\\u0000b\":1}", 0, MOE_INVALID_ARGUMENT, "bad JSON"},
        {"{\"__metadata__\":3}", 0, MOE_INVALID_ARGUMENT, "__metadata__"},
        {"{" TENSOR("t", "F32", "1", "0", "4") "," TENSOR("t", "F32", "1", "4", "8") "}", 8, MOE_INVALID_ARGUMENT, "duplicate"},
        {"{\"t\":3}", 0, MOE_INVALID_ARGUMENT, "tensor t"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, MOE_INVALID_ARGUMENT, "tensor t"},
        {"{\"t\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, MOE_INVALID_ARGUMENT, "tensor t"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}", 4, MOE_INVALID_ARGUMENT, "tensor t"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,4]}}", 4, MOE_INVALID_ARGUMENT, "the shape is not a list"},
        {"{" TENSOR("t", "I64", "1", "0", "8") "}", 8, MOE_UNIMPLEMENTED, "dtype \"I64\""},
        {"{" TENSOR("t", "F8_E4M3", "1", "0", "1") "}", 1, MOE_UNIMPLEMENTED, "tensor t: dtype \"F8_E4M3\""},
        {"{" TENSOR("t", "F32", "1,1,1,1,1", "0", "4") "}", 4, MOE_UNIMPLEMENTED, "5 dimensions"},
        {"{" TENSOR("t", "F32", "-1", "0", "4") "}", 4, MOE_INVALID_ARGUMENT, "tensor t: dimension 0"},
        {"{" TENSOR("t", "F32", "1,1.0", "0", "4") "}", 4, MOE_INVALID_ARGUMENT, "tensor t: dimension 1"},
        {"{" TENSOR("t", "F32", "1,\"1\"", "0", "4") "}", 4, MOE_INVALID_ARGUMENT, "tensor t: dimension 1"},
        {"{" TENSOR("t", "F32", "4611686018427387904", "0", "0") "}", 0, MOE_INVALID_ARGUMENT, "tensor t: the shape overflows"},
        {"{" TENSOR("t", "F32", "4294967296,4294967296", "0", "0") "}", 0, MOE_INVALID_ARGUMENT, "tensor t: the shape overflows"},
        {"{" TENSOR("t", "F32", "99999999999999999999", "0", "0") "}", 0, MOE_INVALID_ARGUMENT, "bad JSON"},
        {"{" TENSOR("t", "F32", "1", "-4", "0") "}", 4, MOE_INVALID_ARGUMENT, "data_offsets"},
        {"{" TENSOR("t", "F32", "1", "4", "0") "}", 4, MOE_INVALID_ARGUMENT, "data_offsets"},
        {"{" TENSOR("t", "F32", "1", "0", "4.0") "}", 4, MOE_INVALID_ARGUMENT, "data_offsets"},
        {"{" TENSOR("t", "F32", "1", "0", "4,4") "}", 4, MOE_INVALID_ARGUMENT, "data_offsets"},
        {"{" TENSOR("t", "F32", "1", "0", "4") "}", 3, MOE_INVALID_ARGUMENT, "tensor t: data_offsets [0, 4) in 3 bytes"},
        {"{" TENSOR("t", "F32", "1", "9223372036854775803", "9223372036854775807") "}", 4, MOE_INVALID_ARGUMENT, "tensor t"},
        {"{" TENSOR("t", "F32", "1", "0", "8") "}", 8, MOE_INVALID_ARGUMENT, "hold 8 bytes, the shape 4"},
        {"{" TENSOR("t", "F32", "1", "0", "4") "," TENSOR("u", "F32", "1", "2", "6") "}", 6, MOE_INVALID_ARGUMENT,
         "tensor u overlaps tensor t"},
        {"{" TENSOR("t", "F32", "1", "0", "4") "," TENSOR("u", "F32", "1", "0", "4") "}", 4, MOE_INVALID_ARGUMENT, "overlaps"},
        {"{" TENSOR("t", "F32", "1", "0", "4") "," TENSOR("u", "F32", "1", "5", "9") "}", 9, MOE_INVALID_ARGUMENT,
         "a hole of 1 bytes before tensor u"},
        {"{" TENSOR("t", "F32", "1", "1", "5") "}", 5, MOE_INVALID_ARGUMENT, "a hole of 1 bytes before tensor t"},
        {"{" TENSOR("t", "F32", "1", "0", "4") "}", 5, MOE_INVALID_ARGUMENT, "1 bytes after the last tensor"},
        {"{" TENSOR("t", "F32", "0", "2", "2") "," TENSOR("u", "F32", "1", "0", "4") "}", 4, MOE_INVALID_ARGUMENT, "overlaps"},
    };
    moe_test_dir dir = moe_test_dir_new();
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        moe_test_write_header(&dir, SINGLE, rows[i].header, rows[i].data_bytes);
        expect_refused(dir.path, rows[i].code, rows[i].what);
    }
    moe_test_dir_free(&dir);
}

static void refuses_bad_header_lengths(void **state) {
    (void)state;
    static const uint64_t lengths[] = {3, UINT64_MAX, INT64_MAX, MOE_SAFETENSORS_MAX_HEADER_BYTES,
                                       MOE_SAFETENSORS_MAX_HEADER_BYTES + 1};
    moe_test_dir dir = moe_test_dir_new();
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        char file[10];
        memcpy(file, &lengths[i], sizeof lengths[i]);
        memcpy(file + 8, "{}", 2);
        moe_test_write_file(&dir, SINGLE, file, sizeof file);
        expect_refused(dir.path, MOE_INVALID_ARGUMENT, "a header of");
    }
    moe_test_write_file(&dir, SINGLE, "", 0);
    expect_refused(dir.path, MOE_INVALID_ARGUMENT, "empty");
    moe_test_remove_file(&dir, SINGLE);
    expect_refused(dir.path, MOE_NOT_FOUND, "neither");
    moe_test_dir_free(&dir);
    expect_refused("/nonexistent/moesaic", MOE_NOT_FOUND, "/nonexistent/moesaic");
}

static size_t header_end(const char *path) {
    size_t size;
    uint64_t header_bytes;
    void *data = moe_test_read_file(path, &size);
    memcpy(&header_bytes, data, sizeof header_bytes);
    free(data);
    return 8 + (size_t)header_bytes;
}

static void refuses_truncation_at_every_header_byte(void **state) {
    (void)state;
    const char *path = FIXTURES "llama_dense/" SINGLE;
    moe_test_dir dir = moe_test_dir_new();
    moe_test_copy_file(&dir, SINGLE, path);
    for (size_t size = header_end(path) + 64; size-- > 0;) {
        moe_test_truncate_file(&dir, SINGLE, size);
        expect_refused(dir.path, MOE_INVALID_ARGUMENT, SINGLE);
    }
    moe_test_dir_free(&dir);
}

/* On exact copies in the heap, where the address sanitizer sees any read past the end. */
static void parser_stays_within_truncated_memory(void **state) {
    (void)state;
    size_t size;
    uint8_t *file = moe_test_read_file(FIXTURES "qwen2_moe/" SINGLE, &size);
    size_t end = header_end(FIXTURES "qwen2_moe/" SINGLE);
    for (size_t cut = 0; cut <= end + 16; cut += cut < 600 || cut + 600 > end ? 1 : 37) {
        moe_safetensor_list list = {0};
        uint8_t *copy = malloc(cut ? cut : 1);
        if (cut > 0) memcpy(copy, file, cut);
        if (cut > end) { /* a header length that matches the cut, so that the JSON itself is what is short */
            uint64_t short_header = (uint64_t)(cut - end) * 512;
            memcpy(copy, &short_header, sizeof short_header);
        }
        assert_int_equal(moe_safetensors_parse(copy, cut, "cut", &list, NULL), MOE_INVALID_ARGUMENT);
        moe_safetensor_list_free(&list);
        free(copy);
    }
    free(file);
}

static void write_two_shards(const moe_test_dir *dir) {
    static const uint16_t data[] = {1, 2};
    const moe_safetensor a = {.name = "a", .dtype = MOE_BF16, .num_dims = 1, .dims = {2}, .data = data};
    const moe_safetensor b = {.name = "b", .dtype = MOE_BF16, .num_dims = 1, .dims = {2}, .data = data};
    moe_test_write_tensors(dir, "one", &a, 1);
    moe_test_write_tensors(dir, "two", &b, 1);
}

static void write_index(const moe_test_dir *dir, const char *text) { moe_test_write_file(dir, INDEX, text, strlen(text)); }

static void opens_shards(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    write_two_shards(&dir);
    write_index(&dir, "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"b\":\"two\",\"a\":\"one\"}}");
    moe_safetensors *c = NULL;
    assert_int_equal(moe_safetensors_open(dir.path, &c, NULL), MOE_OK);
    assert_int_equal(moe_safetensors_count(c), 2);
    assert_false(moe_safetensors_at(c, 0)->used);
    assert_string_equal(moe_safetensors_find(c, "b")->name, "b");
    assert_true(moe_safetensors_at(c, 1)->used);
    moe_safetensors_close(&c);
    moe_test_dir_free(&dir);
}

static void refuses_bad_indexes(void **state) {
    (void)state;
    static const struct {
        const char *index;
        moe_status code;
        const char *what;
    } rows[] = {
        {"{\"weight_map\":{\"a\":\"one\",\"b\":\"two\",\"c\":\"two\"}}", MOE_INVALID_ARGUMENT,
         "tensor c is not in its shard two"},
        {"{\"weight_map\":{\"a\":\"one\",\"c\":\"two\"}}", MOE_INVALID_ARGUMENT, "tensor b of shard two is not in the index"},
        {"{\"weight_map\":{\"a\":\"two\",\"b\":\"one\"}}", MOE_INVALID_ARGUMENT, "the index says"},
        {"{\"weight_map\":{\"a\":\"one\",\"b\":\"three\"}}", MOE_NOT_FOUND, "three"},
        {"{\"weight_map\":{\"a\":\"one\",\"b\":\"../two\"}}", MOE_INVALID_ARGUMENT, "tensor b: \"../two\" is not a file name"},
        {"{\"weight_map\":{\"a\":\"one\",\"b\":\"/etc/passwd\"}}", MOE_INVALID_ARGUMENT, "is not a file name"},
        {"{\"weight_map\":{\"a\":\"..\"}}", MOE_INVALID_ARGUMENT, "is not a file name"},
        {"{\"weight_map\":{\"a\":\".\"}}", MOE_INVALID_ARGUMENT, "is not a file name"},
        {"{\"weight_map\":{\"a\":\"\"}}", MOE_INVALID_ARGUMENT, "is not a file name"},
        {"{\"weight_map\":{\"a\":1}}", MOE_INVALID_ARGUMENT, "the shard is not a name"},
        {"{\"weight_map\":{\"a\":\"one\",\"a\":\"two\"}}", MOE_INVALID_ARGUMENT, "duplicate"},
        {"{\"weight_map\":[]}", MOE_INVALID_ARGUMENT, "weight_map"},
        {"{}", MOE_INVALID_ARGUMENT, "weight_map"},
        {"", MOE_INVALID_ARGUMENT, "bad JSON"},
    };
    moe_test_dir dir = moe_test_dir_new();
    write_two_shards(&dir);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        write_index(&dir, rows[i].index);
        expect_refused(dir.path, rows[i].code, rows[i].what);
    }
    moe_test_copy_file(&dir, "three", FIXTURES "llama_dense/config.json");
    write_index(&dir, "{\"weight_map\":{\"a\":\"one\",\"b\":\"three\"}}");
    expect_refused(dir.path, MOE_INVALID_ARGUMENT, "three");
    moe_test_dir_free(&dir);
}

static void refuses_a_tensor_in_two_shards(void **state) {
    (void)state;
    static const uint16_t data[] = {1};
    const moe_safetensor both[] = {{.name = "b", .dtype = MOE_BF16, .num_dims = 1, .dims = {1}, .data = data},
                                   {.name = "a", .dtype = MOE_BF16, .num_dims = 1, .dims = {1}, .data = data}};
    moe_test_dir dir = moe_test_dir_new();
    moe_test_write_tensors(&dir, "one", both, 2);
    moe_test_write_tensors(&dir, "two", both, 1);
    write_index(&dir, "{\"weight_map\":{\"a\":\"one\",\"b\":\"two\"}}");
    expect_refused(dir.path, MOE_INVALID_ARGUMENT, "tensor b is in shard one, the index says two");
    moe_test_dir_free(&dir);
}

static void survives_every_failed_allocation(void **state) {
    (void)state;
    int failures = 0;
    for (int64_t n = 1;; n++) {
        moe_safetensors *c = NULL;
        moe_alloc_fail_after(n);
        moe_status status = moe_safetensors_open(FIXTURES "mixtral", &c, NULL);
        moe_alloc_fail_after(0);
        if (status == MOE_OK) {
            moe_safetensors_close(&c);
            break;
        }
        assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        assert_null(c);
        failures++;
    }
    assert_true(failures > 100);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_tensors_by_name),
        cmocka_unit_test(accepts_metadata_padding_and_no_tensors),
        cmocka_unit_test(refuses_bad_headers),
        cmocka_unit_test(refuses_bad_header_lengths),
        cmocka_unit_test(refuses_truncation_at_every_header_byte),
        cmocka_unit_test(parser_stays_within_truncated_memory),
        cmocka_unit_test(opens_shards),
        cmocka_unit_test(refuses_bad_indexes),
        cmocka_unit_test(refuses_a_tensor_in_two_shards),
        cmocka_unit_test(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
