// The arrays and the indexer that CuPy hands to its generated kernels.
#pragma once

#include "cuda_on_host.h"

class float16;

#define CUPY_FOR(i, n)                                            \
  for (ptrdiff_t i =                                              \
           static_cast<ptrdiff_t>(blockIdx.x) * blockDim.x +      \
           threadIdx.x;                                           \
       i < (n); i += static_cast<ptrdiff_t>(blockDim.x) * gridDim.x)

template <typename T, int _ndim, bool _c_contiguous = false,
          bool _use_32bit_indexing = false>
class CArray {
 public:
  static const int ndim = _ndim;
  static const bool c_contiguous = _c_contiguous;

 private:
  T* data_;
  ptrdiff_t size_;
  ptrdiff_t shape_[ndim];
  ptrdiff_t strides_[ndim];

  T& at(ptrdiff_t i) const {
    // The address of the first element is taken of empty arrays, too.
    if (i < 0 || (i >= size_ && i)) {
      coh_fail("index %lld is out of the bounds of an array of %lld",
               (long long)i, (long long)size_);
    }
    if (c_contiguous) return data_[i];
    ptrdiff_t offset = 0;
    for (int dim = ndim; --dim > 0;) {
      if (shape_[dim] == 0) return *data_;
      offset += strides_[dim] * (i % shape_[dim]);
      i /= shape_[dim];
    }
    offset += strides_[0] * i;
    return *reinterpret_cast<T*>(reinterpret_cast<char*>(data_) + offset);
  }

  template <typename Int>
  T& at_indices(const Int* index) const {
    ptrdiff_t offset = 0;
    for (int dim = 0; dim < ndim; ++dim) {
      if (index[dim] < 0 || index[dim] >= shape_[dim]) {
        coh_fail("index %lld is out of the bounds of axis %d of size %lld",
                 (long long)index[dim], dim, (long long)shape_[dim]);
      }
      offset += strides_[dim] * static_cast<ptrdiff_t>(index[dim]);
    }
    return *reinterpret_cast<T*>(reinterpret_cast<char*>(data_) + offset);
  }

 public:
  ptrdiff_t size() const { return size_; }
  const ptrdiff_t* shape() const { return shape_; }
  const ptrdiff_t* strides() const { return strides_; }

  template <typename Int>
  T& operator[](const Int (&index)[ndim]) {
    return at_indices(index);
  }
  template <typename Int>
  const T& operator[](const Int (&index)[ndim]) const {
    return at_indices(index);
  }
  T& operator[](ptrdiff_t i) { return at(i); }
  const T& operator[](ptrdiff_t i) const { return at(i); }
};

template <typename T, bool _use_32bit_indexing>
class CArray<T, 0, true, _use_32bit_indexing> {
 private:
  T* data_;
  ptrdiff_t size_;

 public:
  static const int ndim = 0;
  ptrdiff_t size() const { return size_; }
  const ptrdiff_t* shape() const { return NULL; }
  const ptrdiff_t* strides() const { return NULL; }
  template <typename U>
  T& operator[](const U&) {
    return *data_;
  }
  template <typename U>
  const T& operator[](const U&) const {
    return *data_;
  }
};

template <int _ndim, bool _use_32bit_indexing = false>
class CIndexer {
 public:
  static const int ndim = _ndim;

 private:
  ptrdiff_t size_;
  ptrdiff_t shape_[ndim];
  ptrdiff_t index_[ndim];
  typedef ptrdiff_t index_t[ndim];

 public:
  ptrdiff_t size() const { return size_; }
  const index_t& get() const { return index_; }
  void set(ptrdiff_t i) {
    for (int dim = ndim; --dim > 0;) {
      index_[dim] = i % shape_[dim];
      i /= shape_[dim];
    }
    index_[0] = i;
  }
};

template <bool _use_32bit_indexing>
class CIndexer<0, _use_32bit_indexing> {
 private:
  ptrdiff_t size_;

 public:
  static const int ndim = 0;
  ptrdiff_t size() const { return size_; }
  void set(ptrdiff_t) {}
  const ptrdiff_t* get() const { return NULL; }
};
