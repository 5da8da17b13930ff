/* Products with thin matrices (8 columns or fewer) that read or write the wide one once, which is what they cost. fp32, row-major, contiguous.

   B^T is laid out first, so that its rows stay in the cache while the wide matrix streams by. Vectors by GCC's and clang's extension: any instruction set. */

#include <stdlib.h>
#include <string.h>

typedef float vec __attribute__((vector_size(64)));
enum { LANES = 16, COLUMNS = 8, AHEAD = 4 };

static vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static float sum(vec v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }

static float *transposed(const float *B, long n, long r) {
    float *T = aligned_alloc(64, ((size_t)(n * r) * sizeof(float) + 63) / 64 * 64);
    if (T)
        for (long j = 0; j < n; j++)
            for (long k = 0; k < r; k++) T[k * n + j] = B[j * r + k];
    return T;
}

/* c columns of two rows, or of one: R[i][k] = sum_j A[i][j] T[k][j] */
static inline __attribute__((always_inline)) void dots(const float *a, const float *b, const float *T, long n, int c, float *ra, float *rb) {
    vec sa[COLUMNS] = {0}, sb[COLUMNS] = {0};
    long j = 0;
    for (; j + LANES <= n; j += LANES) {
        vec x = load(a + j), y = load(b + j);
        __builtin_prefetch(a + AHEAD * n + j); /* rows to come: the processor does not guess them while two are read at once */
        __builtin_prefetch(b + AHEAD * n + j);
        for (int k = 0; k < c; k++) {
            vec t = load(T + k * n + j);
            sa[k] += x * t;
            sb[k] += y * t;
        }
    }
    for (int k = 0; k < c; k++) {
        float p = sum(sa[k]), q = sum(sb[k]);
        for (long i = j; i < n; i++) { p += a[i] * T[k * n + i]; q += b[i] * T[k * n + i]; }
        ra[k] = p;
        rb[k] = q;
    }
}

/* R (m, r) = A (m, n) B (n, r). 0, or 1 where there was no memory. */
int thin_product(long m, long n, long r, const float *A, const float *B, float *R, int threads) {
    float *T = transposed(B, n, r);
    if (!T) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < m; i += 2) {
        long other = i + 1 < m ? i + 1 : i; /* the last row of an odd number goes twice */
        long k = 0;
        for (; k + COLUMNS <= r; k += COLUMNS) dots(A + i * n, A + other * n, T + k * n, n, COLUMNS, R + i * r + k, R + other * r + k);
        for (; k + 4 <= r; k += 4) dots(A + i * n, A + other * n, T + k * n, n, 4, R + i * r + k, R + other * r + k);
        for (; k < r; k++) dots(A + i * n, A + other * n, T + k * n, n, 1, R + i * r + k, R + other * r + k);
    }
    free(T);
    return 0;
}

static inline __attribute__((always_inline)) void add(float *a, float *b, const float *T, long n, int c, const float *la, const float *lb, int two) {
    long j = 0;
    for (; j + LANES <= n; j += LANES) {
        vec x = load(a + j), y = load(b + j);
        __builtin_prefetch(a + AHEAD * n + j, 1);
        __builtin_prefetch(b + AHEAD * n + j, 1);
        for (int k = 0; k < c; k++) {
            vec t = load(T + k * n + j);
            x += la[k] * t;
            y += lb[k] * t;
        }
        store(a + j, x);
        if (two) store(b + j, y);
    }
    for (; j < n; j++)
        for (int k = 0; k < c; k++) {
            a[j] += la[k] * T[k * n + j];
            if (two) b[j] += lb[k] * T[k * n + j];
        }
}

/* C (m, n) += alpha L (m, r) B^T, B (n, r). */
int thin_add(long m, long n, long r, float alpha, const float *L, const float *B, float *C, int threads) {
    float *T = transposed(B, n, r);
    if (!T) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < m; i += 2) {
        int two = i + 1 < m;
        long other = two ? i + 1 : i;
        float la[COLUMNS], lb[COLUMNS];
        for (long k = 0; k < r; k += COLUMNS) {
            int c = r - k < COLUMNS ? (int)(r - k) : COLUMNS;
            for (int q = 0; q < c; q++) { la[q] = alpha * L[i * r + k + q]; lb[q] = alpha * L[other * r + k + q]; }
            if (c == COLUMNS) add(C + i * n, C + other * n, T + k * n, n, COLUMNS, la, lb, two);
            else add(C + i * n, C + other * n, T + k * n, n, c, la, lb, two);
        }
    }
    free(T);
    return 0;
}
