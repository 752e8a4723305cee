package parity

// proof is a test that shows that a promise of the node is kept.
type proof struct{ pkg, test string }

// nodePromises are what a node is owed beside traffic. They are the same in all modes.
var nodePromises = []struct {
	name   string
	proofs []proof
}{
	{"`/healthz`: unhealthy while an update waits too long, or the Node goes away; with `lastUpdated`. `/livez` does not look at the Node", []proof{
		{"agent", "TestHealthLikeKubeProxy"}, {"agent", "TestHealthBodyBeforeTheFirstSync"}, {"agent", "TestNodeThatGoesAwayIsUnhealthyAndForwardsOn"}, {"agent", "TestTaintedFromTheStart"}}},
	{"`/metrics`, `/proxyMode` and `/configz`; profiles only if asked for", []proof{{"agent", "TestProxyMode"}, {"cmd/internal/configuration", "TestProfilesOnlyIfEnabled"}}},
	{"Health-check node ports: 200 with ready endpoints on the node, else 503", []proof{
		{"agent/healthport", "TestServers"}, {"agent/healthport", "TestAddresses"}, {"agent", "TestHealthCheckAfterTheKernel"}, {"agent/compile", "TestHealthCheck"}}},
	{"Nothing is programmed before everything is known; bursts are folded", []proof{
		{"agent", "TestNothingBeforeEverySourceHasDelivered"}, {"agent", "TestBurstsAreFolded"}}},
	{"A cold start begins with the API server and DNS", []proof{{"agent", "TestEssential"}, {"agent", "TestColdStartBeginsWithTheEssential"}}},
	{"Kernel parameters are raised, never lowered, and each can be left alone", []proof{
		{"agent/sysctl", "TestParameters"}, {"agent/sysctl", "TestRaiseNeverLowers"}, {"agent/sysctl", "TestReadOnlyProc"}, {"agent", "TestTuner"}}},
	{"Addresses, pod ranges and labels of the node may change while it runs", []proof{
		{"agent", "TestNodeChangesWhileItRuns"}, {"agent", "TestNodeCIDR"}, {"agent", "TestSettingsChangeWhileItRuns"}}},
	{"Rules stay when the agent stops; `--cleanup` takes everything away", []proof{
		{"agent", "TestStoppingLeavesTheRules"}, {"agent", "TestCleanup"}, {"agent", "TestCleanupRemovesTheAnchor"}}},
	{"How long a change takes to be in force is measured", []proof{{"agent", "TestNetworkProgrammingIsMeasured"}}},
	{"Services of other proxies, headless and ExternalName ones are left alone", []proof{{"controllers/allocator", "TestSelect"}}},
	{"A wrong configuration is refused with the field's name, and what can be taken in live is", []proof{
		{"cmd/agent", "TestBadFile"}, {"cmd/agent", "TestBadFlags"}, {"cmd/internal/configuration", "TestFollowingAConfigMap"}, {"cmd/internal/configuration", "TestAWrongOrMissingFileChangesNothing"}}},
}
