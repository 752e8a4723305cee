package v1alpha1_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
)

var _ = DescribeTable("kubectl get", func(ctx context.Context, kind, resource, patch, narrow, wide string) {
	made := object(kind, patch)
	status := made.Object["status"]
	Expect(c.Create(ctx, made)).To(Succeed())
	DeferCleanup(func(ctx context.Context) { Expect(c.Delete(ctx, made)).To(Succeed()) })
	if status != nil {
		made.Object["status"] = status
		Expect(c.Status().Update(ctx, made)).To(Succeed())
	}
	Expect(table(ctx, resource, made, 0)).To(Equal(narrow))
	Expect(table(ctx, resource, made, 1)).To(Equal(wide))
},
	func(kind, _, _, _, _ string) string { return kind },
	Entry(nil, "ServiceProxyPolicy", "serviceproxypolicies", `
spec: {serviceRanges: [{cidr: 10.99.0.0/16}, {cidr: "fd00:99::/112"}], priority: 7}
status:
  conditions: [{type: Ready, status: "False", reason: ServicesNotProgrammed, message: "", lastTransitionTime: "2026-01-01T00:00:00Z"}]
  families: [`+counts("family: IPv4")+`]
  services: {covered: 3, assigned: 3, programmed: 2, waiting: 0, takenOver: 1}
  nodes: {selected: 4, ready: 3, unsupported: 0}`,
		"Name=tenant-a Mode=NFTables Range=10.99.0.0/16 Services=3 Programmed=2 Nodes=3 Ready=False Reason=ServicesNotProgrammed",
		"Name=tenant-a Mode=NFTables Range=10.99.0.0/16 Services=3 Programmed=2 Nodes=3 Ready=False Reason=ServicesNotProgrammed Priority=7 Taken-Over=1 Free-IPv4=1 Free-IPv6=<nil>"),
	Entry(nil, "ServiceAssignment", "serviceassignments", `
spec: {ports: [{name: http, protocol: TCP, port: 80, nodePort: 30080}]}
status:
  conditions: [`+condition("Allocated")+`, `+condition("Programmed")+`]
  nodes: {desired: 3, programmed: 2}`,
		"Name=web Policy=tenant-a Mode=NFTables Service-IP=10.99.13.178 Port=80 Node-Port=30080 Allocated=True Programmed=True Nodes=2 Reason=R",
		"Name=web Policy=tenant-a Mode=NFTables Service-IP=10.99.13.178 Port=80 Node-Port=30080 Allocated=True Programmed=True Nodes=2 Reason=R Desired=3"),
	Entry(nil, "AllocationClaim", "allocationclaims", `{}`,
		"Name=10.99.13.178 State=Bound Use=ClusterIP Namespace=default Service=web Policy=tenant-a",
		"Name=10.99.13.178 State=Bound Use=ClusterIP Namespace=default Service=web Policy=tenant-a Expires=<nil>"),
	Entry(nil, "NodeProxyState", "nodeproxystates", `
status:
  assignmentRevision: "12"
  endpointSliceRevision: "13"
  services: 3
  endpoints: 30
  driftRepairs: 1
  agentVersion: v0.1.0
  kubeProxy: NFTables
  modes: [{mode: IPVS, available: false, services: 0}, {mode: NFTables, available: true, services: 3}]
  conditions: [`+condition("Ready")+`]`,
		"Name=node1 Ready=True Services=3 Endpoints=30 Mode=NFTables Applied=<nil>",
		"Name=node1 Ready=True Services=3 Endpoints=30 Mode=NFTables Applied=<nil> Repairs=1 Assignments-At=12 EndpointSlices-At=13 Kube-Proxy=NFTables Version=v0.1.0"),
)

// table gets the object as the API server prints it for kubectl, as COLUMN=cell for every column up to the priority but Age.
func table(ctx context.Context, resource string, made *unstructured.Unstructured, priority int32) string {
	GinkgoHelper()
	path := "/apis/networking.serviceproxy.io/v1alpha1/"
	if namespace := made.GetNamespace(); namespace != "" {
		path += "namespaces/" + namespace + "/"
	}
	httpClient, err := rest.HTTPClientFor(config)
	Expect(err).NotTo(HaveOccurred())
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(config.Host, "/")+path+resource+"/"+made.GetName(), nil)
	Expect(err).NotTo(HaveOccurred())
	request.Header.Set("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
	response, err := httpClient.Do(request)
	Expect(err).NotTo(HaveOccurred())
	defer response.Body.Close()
	Expect(response).To(HaveHTTPStatus(http.StatusOK))
	var table metav1.Table
	Expect(json.NewDecoder(response.Body).Decode(&table)).To(Succeed())
	Expect(table.Rows).To(HaveLen(1))
	var cells []string
	for i, column := range table.ColumnDefinitions {
		if column.Priority <= priority && column.Name != "Age" {
			cells = append(cells, fmt.Sprintf("%s=%v", column.Name, table.Rows[0].Cells[i]))
		}
	}
	return strings.Join(cells, " ")
}
