// The one file that includes libibverbs' header. The library is opened at run time: without it everything else works.
#pragma once

#include <infiniband/verbs.h>

#include <string>

#undef ibv_query_port
#undef ibv_reg_mr

namespace dualkv {

// The calls in use. Tests replace entries to inject faults.
struct Verbs {
  decltype(&::ibv_get_device_list) get_device_list;
  decltype(&::ibv_free_device_list) free_device_list;
  decltype(&::ibv_get_device_name) get_device_name;
  decltype(&::ibv_open_device) open_device;
  decltype(&::ibv_close_device) close_device;
  decltype(&::ibv_query_device) query_device;
  int (*query_port)(ibv_context*, std::uint8_t port, ibv_port_attr*);
  decltype(&::ibv_query_gid) query_gid;
  decltype(&::ibv_alloc_pd) alloc_pd;
  decltype(&::ibv_dealloc_pd) dealloc_pd;
  ibv_mr* (*reg_mr)(ibv_pd*, void*, std::size_t bytes, int access);
  // May be null: needs rdma-core 28. Takes IBV_ACCESS_OPTIONAL flags.
  ibv_mr* (*reg_mr_iova2)(ibv_pd*, void*, std::size_t bytes, std::uint64_t iova, unsigned int access);
  // May be null: needs rdma-core 34.
  decltype(&::ibv_reg_dmabuf_mr) reg_dmabuf_mr;
  decltype(&::ibv_dereg_mr) dereg_mr;
  decltype(&::ibv_create_comp_channel) create_comp_channel;
  decltype(&::ibv_destroy_comp_channel) destroy_comp_channel;
  decltype(&::ibv_create_cq) create_cq;
  decltype(&::ibv_destroy_cq) destroy_cq;
  decltype(&::ibv_get_cq_event) get_cq_event;
  decltype(&::ibv_ack_cq_events) ack_cq_events;
  decltype(&::ibv_get_async_event) get_async_event;
  decltype(&::ibv_ack_async_event) ack_async_event;
  decltype(&::ibv_create_qp) create_qp;
  decltype(&::ibv_modify_qp) modify_qp;
  decltype(&::ibv_query_qp) query_qp;
  decltype(&::ibv_destroy_qp) destroy_qp;
  decltype(&::ibv_wc_status_str) wc_status_str;
  // These go straight to the driver.
  int (*post_send)(ibv_qp*, ibv_send_wr*, ibv_send_wr** bad);
  int (*post_recv)(ibv_qp*, ibv_recv_wr*, ibv_recv_wr** bad);
  int (*poll_cq)(ibv_cq*, int most, ibv_wc*);
  int (*req_notify_cq)(ibv_cq*, int solicited_only);
};

// Null where libibverbs is not installed or too old; `why` then says so. Any thread.
Verbs* verbs(std::string* why = nullptr);

}  // namespace dualkv
