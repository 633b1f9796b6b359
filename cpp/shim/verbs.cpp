// Opening libibverbs.
#include "shim/verbs.h"

#include "shim/library.h"

namespace dualkv {

namespace {

Loaded<Verbs> load() {
  SharedLibrary shared("libibverbs.so.1");
  if (!shared.error().empty()) {
    return {{}, shared.error() + "; install rdma-core (libibverbs1, ibverbs-providers)"};
  }
  Verbs v{};
  // The oldest version of each call that has today's structs.
  const auto find = [&](auto& entry, const char* name, const char* version = "IBVERBS_1.1") {
    shared.find(entry, name, version);
  };
  find(v.get_device_list, "ibv_get_device_list");
  find(v.free_device_list, "ibv_free_device_list");
  find(v.get_device_name, "ibv_get_device_name");
  find(v.open_device, "ibv_open_device");
  find(v.close_device, "ibv_close_device");
  find(v.query_device, "ibv_query_device");
  find(v.query_port, "ibv_query_port");
  find(v.query_gid, "ibv_query_gid");
  find(v.alloc_pd, "ibv_alloc_pd");
  find(v.dealloc_pd, "ibv_dealloc_pd");
  find(v.reg_mr, "ibv_reg_mr");
  find(v.dereg_mr, "ibv_dereg_mr");
  find(v.create_comp_channel, "ibv_create_comp_channel", "IBVERBS_1.0");
  find(v.destroy_comp_channel, "ibv_destroy_comp_channel", "IBVERBS_1.0");
  find(v.create_cq, "ibv_create_cq");
  find(v.destroy_cq, "ibv_destroy_cq");
  find(v.get_cq_event, "ibv_get_cq_event");
  find(v.ack_cq_events, "ibv_ack_cq_events");
  find(v.get_async_event, "ibv_get_async_event");
  find(v.ack_async_event, "ibv_ack_async_event");
  find(v.create_qp, "ibv_create_qp");
  find(v.modify_qp, "ibv_modify_qp");
  find(v.query_qp, "ibv_query_qp");
  find(v.destroy_qp, "ibv_destroy_qp");
  find(v.wc_status_str, "ibv_wc_status_str");
  if (!shared.missing().empty())
    return {{}, "libibverbs.so.1 has no " + shared.missing() + "; install a newer rdma-core"};
  find(v.reg_mr_iova2, "ibv_reg_mr_iova2", "IBVERBS_1.8");
  find(v.reg_dmabuf_mr, "ibv_reg_dmabuf_mr", "IBVERBS_1.12");
  v.post_send = [](ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad) { return qp->context->ops.post_send(qp, wr, bad); };
  v.post_recv = [](ibv_qp* qp, ibv_recv_wr* wr, ibv_recv_wr** bad) { return qp->context->ops.post_recv(qp, wr, bad); };
  v.poll_cq = [](ibv_cq* cq, int most, ibv_wc* out) { return cq->context->ops.poll_cq(cq, most, out); };
  v.req_notify_cq = [](ibv_cq* cq, int solicited) { return cq->context->ops.req_notify_cq(cq, solicited); };
  return {v, {}};
}

}  // namespace

Verbs* verbs(std::string* why) {
  static Loaded<Verbs> loaded = load();
  return loaded.get(why);
}

}  // namespace dualkv
