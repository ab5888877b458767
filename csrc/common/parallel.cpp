#include "common/parallel.h"

#include <dlfcn.h>
#include <immintrin.h>
#include <link.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/team.h"

namespace fastllm {

void barrier_wait(Barrier* barrier, int size) {
  const int generation = __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier->generation, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  // A barrier of a decode step is met within microseconds: spin first, then let others run, because
  // the peer may have lost its core to another process.
  for (int spin = 0; __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE) == generation;
       ++spin) {
    if (spin < 4096)
      _mm_pause();
    else
      sched_yield();
  }
}

namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  explicit operator bool() const { return parallel && thread_num && num_threads && max_threads; }
};

int find_gomp(dl_phdr_info* info, size_t, void* path) {
  if (!info->dlpi_name || !std::strstr(info->dlpi_name, "libgomp")) return 0;
  *static_cast<std::string*>(path) = info->dlpi_name;
  return 1;
}

OpenMP load_openmp() {
  OpenMP omp;
  std::string
      path;  // torch wheels carry libgomp under names of their own, so search what is mapped
  if (!dl_iterate_phdr(find_gomp, &path)) return omp;
  void* lib = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  if (!lib) return omp;
  omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(lib, "GOMP_parallel"));
  omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(dlsym(lib, "omp_get_thread_num"));
  omp.num_threads = reinterpret_cast<decltype(omp.num_threads)>(dlsym(lib, "omp_get_num_threads"));
  omp.max_threads = reinterpret_cast<decltype(omp.max_threads)>(dlsym(lib, "omp_get_max_threads"));
  return omp;
}

const OpenMP& openmp() {
  static const OpenMP omp = load_openmp();
  return omp;
}

struct Region {
  void (*body)(int, int, void*);
  void* context;
};

void enter_openmp(void* data) {
  const auto* region = static_cast<Region*>(data);
  region->body(openmp().thread_num(), openmp().num_threads(), region->context);
}

// Workers sleep between regions; used only where no OpenMP runtime is mapped.
class OwnPool {
 public:
  void run(int threads, const Region& region) {
    std::lock_guard<std::mutex> one_region(region_mutex_);
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      region_ = region;
      size_ = threads;
      running_ = threads - 1;
      ++epoch_;
    }
    start_.notify_all();
    region.body(0, threads, region.context);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
  }

 private:
  void grow(int workers) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int>(workers_.size()) < workers) {
      const int id = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, id, seen = epoch_]() mutable { work(id, seen); });
      workers_.back().detach();
    }
  }
  void work(int id, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return epoch_ != seen; });
      seen = epoch_;
      if (id >= size_) continue;
      const Region region = region_;
      const int size = size_;
      lock.unlock();
      region.body(id, size, region.context);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }
  std::mutex region_mutex_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  Region region_{};
  int size_ = 0, running_ = 0;
  uint64_t epoch_ = 0;
};

std::atomic<int> own_threads{0};

OwnPool& own_pool() {
  // A forked child has no workers: it gets a new pool. Pools are never destroyed, because detached
  // workers may still wait on them when the process ends.
  static std::mutex mutex;
  static pid_t owner = 0;
  static OwnPool* pool = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (!pool || owner != getpid()) {
    pool = new OwnPool;
    owner = getpid();
  }
  return *pool;
}

}  // namespace

void run_parallel(int threads, void (*body)(int, int, void*), void* context) {
  if (threads <= 1) return body(0, 1, context);
  Region region{body, context};
  if (openmp()) return openmp().parallel(enter_openmp, &region, static_cast<unsigned>(threads), 0);
  own_pool().run(threads, region);
}

int num_threads() {
  if (openmp()) return openmp().max_threads();
  const int own = own_threads.load();
  return own > 0 ? own : static_cast<int>(std::thread::hardware_concurrency());
}

void set_own_threads(int threads) { own_threads = threads; }

const char* thread_runtime() { return openmp() ? "libgomp (shared with torch)" : "own pool"; }

}  // namespace fastllm
